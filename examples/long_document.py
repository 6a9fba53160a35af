"""A question about a long document, answered from a compressed cache.

python examples/long_document.py --file report.txt --question "What does the report conclude?" --compression 6

The cache is first written with few bits a number. Rows that the answer's attention returns to are quantized again
with more bits, from their originals in this process's memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qaq_core import QAQCache
from qaq_core.models import default_model_path, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="UTF-8 text; default: a chapter of the Python reference")
    parser.add_argument("--question", default='What is the "with" statement used for?')
    parser.add_argument("--compression", type=float, default=6.0, help="of the cache against fp16")
    parser.add_argument("--model", help="local directory, GGUF file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--max-tokens", type=int, default=1500, help="most tokens of the document that are read")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    options = parser.parse_args()

    loaded = load_model(options.model or str(default_model_path()))
    tokenizer = loaded.tokenizer
    document = options.file.read_text() if options.file else python_reference()
    document = tokenizer.decode(tokenizer(document)["input_ids"][: options.max_tokens])
    asked = [{"role": "user", "content": f"{document}\n\nAnswer from the text above: {options.question}"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    cache = QAQCache.for_model(loaded.model, fingerprint=loaded.fingerprint, target_compression=options.compression)
    ids = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    (held,) = cache.stats()
    print(
        f"{held.tokens} tokens in {held.kv_bytes:,} bytes: {held.compression:.1f} times smaller than fp16; "
        f"{held.rows_requantized:,} rows quantized again"
    )


def python_reference() -> str:
    """A text that every Python brings."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[chapter].strip() for chapter in ("with", "assert", "for", "while", "try"))


if __name__ == "__main__":
    main()
