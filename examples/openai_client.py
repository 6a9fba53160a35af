"""A chat with OpenAI's own client.

qaq up --http-port 8000     # prints the line that sets QAQ_API_KEY
pip install openai
python examples/openai_client.py --url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="Name the capital of France.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=60)
    options = parser.parse_args()

    with OpenAI(base_url=options.url, api_key=os.environ.get("QAQ_API_KEY", "none")) as client:
        (model,) = client.models.list().data
        stream = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": options.question}],
            max_tokens=options.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cache": {"preset": "balanced", "target_bits": 3}},  # QAQ's own; leave it out for the defaults
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            elif chunk.usage:
                print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    main()
