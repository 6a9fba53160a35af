"""What litellm gets from an address and a model: JSON on standard output."""

import json
import sys

import litellm

url, model = sys.argv[1:]
to = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
asked = {"messages": [{"role": "user", "content": "Name the capital of France."}], "max_tokens": 20, "temperature": 0}

said = litellm.completion(**to, **asked)
streamed = litellm.completion(**to, **asked, stream=True, stream_options={"include_usage": True})
chunks = list(streamed)
city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": city}}
print(
    json.dumps(
        {
            "answer": said.choices[0].message.content,
            "usage": [said.usage.prompt_tokens, said.usage.completion_tokens],
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "streamed_usage": next(u.completion_tokens for c in chunks if (u := getattr(c, "usage", None))),
            "structured": litellm.completion(**to, **asked, response_format=schema).choices[0].message.content,
            "completion": litellm.text_completion(
                model=f"text-completion-openai/{model}",
                api_base=to["api_base"],
                api_key="none",
                prompt="The capital of France is",
                max_tokens=8,
                temperature=0,
            )
            .choices[0]
            .text,
        }
    )
)
