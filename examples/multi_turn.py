"""A conversation with one cache: each turn computes only its new tokens.

python examples/multi_turn.py "Name the capital of France." "And of Italy?"
"""

from __future__ import annotations

import argparse

from qaq_core import QAQCache
from qaq_core.models import default_model_path, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=["Name the capital of France.", "And of Italy?"])
    parser.add_argument("--model", help="local directory, GGUF file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    options = parser.parse_args()

    loaded = load_model(options.model or str(default_model_path()))
    tokenizer, cache = loaded.tokenizer, QAQCache.for_model(loaded.model, fingerprint=loaded.fingerprint)
    messages: list[dict[str, str]] = []
    for question in options.questions:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt, known = inputs["input_ids"].shape[1], cache.get_seq_length()
        ids = loaded.model.generate(
            **inputs, past_key_values=cache, max_new_tokens=options.max_new_tokens, do_sample=False
        )
        answer = tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer}")
        print(f"[{known} tokens were in the cache, {prompt - known} were computed; {cache.nbytes:,} bytes]")


if __name__ == "__main__":
    main()
