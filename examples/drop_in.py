"""A quantized KV cache in place of transformers' own.

python examples/drop_in.py "Once upon a time"
"""

from __future__ import annotations

import argparse

from qaq_core import QAQCache
from qaq_core.models import default_model_path, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--model", help="local directory, GGUF file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    options = parser.parse_args()

    loaded = load_model(options.model or str(default_model_path()))
    cache = QAQCache.for_model(loaded.model, fingerprint=loaded.fingerprint)
    inputs = loaded.tokenizer(options.prompt, return_tensors="pt")
    ids = loaded.model.generate(**inputs, past_key_values=cache, max_new_tokens=options.max_new_tokens, do_sample=False)

    print(loaded.tokenizer.decode(ids[0], skip_special_tokens=True))
    (held,) = cache.stats()
    print(f"{held.tokens} tokens in {held.kv_bytes:,} bytes: {held.compression:.1f} times smaller than fp16")


if __name__ == "__main__":
    main()
