"""Counts the tokens of an answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qaq.v1 import common_pb2, generate_pb2

Json = dict[str, Any]


class UsageCounter:
    """Tokens of all choices, each prompt counted once."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._generated: Counter[tuple[int, int]] = Counter()
        self._finished: list[tuple[int, common_pb2.Usage]] = []

    def add(self, place: int, reply: generate_pb2.GenerateReply) -> None:
        """Counts a message of the prompt at index `place`."""
        match reply.WhichOneof("event"):
            case "prefill":
                self._prompts[place] = reply.prefill.tokens_total
            case "token":
                self._generated[place, reply.token.choice] += 1
            case "finished":
                self._finished.append((place, reply.finished.usage))
                self._prompts[place] = reply.finished.usage.prompt_tokens

    def so_far(self) -> Json:
        """As OpenAI's `usage`."""
        prompt, generated = sum(self._prompts.values()), sum(self._generated.values())
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def total(self) -> Json:
        """With the cached tokens of the prompts, and the extension `cache`, which has sums over all choices."""
        cached = {place: usage.loaded_tokens + usage.kept_tokens for place, usage in self._finished}
        caches = [usage.cache for _, usage in self._finished]
        names = ("kv_bytes", "kv_bytes_fp16", "exceptions")
        return self.so_far() | {
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "cache": {name: sum(getattr(cache, name) for cache in caches) for name in names},
        }
