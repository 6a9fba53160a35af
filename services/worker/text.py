"""Tokens become text as they come: never half a character, nothing that may belong to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from qaq_core.base.errors import UnsupportedModelError

# Decoders look back a little (a word's leading space depends on the word before).
_CONTEXT = 8


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` of a transformers tokenizer.

    Raises:
        UnsupportedModelError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError("the tokenizer cannot decode as it goes; convert it to a tokenizer.json")
    return backend


class TextStream:
    """Text of one generation.

    Args:
        backend: from `backend_of`.
        prompt: tokens before the generation.
        stop: strings that end it; their text and what follows is never given out.

    Attributes:
        found: the stop string that has appeared, or None.
    """

    def __init__(self, backend: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._backend = backend
        self._decoder = DecodeStream(ids=list(prompt[-_CONTEXT:]), skip_special_tokens=True)
        self._undecoded: list[int] = []
        self._held = ""
        self._stop = tuple(stop)
        self.found: str | None = None

    def push(self, token: int) -> str:
        """Text that became certain with this token; may be empty."""
        if self.found is not None:
            return ""
        text = self._decoder.step(self._backend, token)
        if text is None:
            self._undecoded.append(token)
            return ""
        self._undecoded.clear()
        return self._filter(text)

    def finish(self) -> str:
        """What was held back until the end was certain."""
        if self.found is not None:
            return ""
        rest = self._backend.decode(self._undecoded, skip_special_tokens=True)
        text = self._filter(rest)
        text, self._held = text + self._held, ""
        return text

    def _filter(self, text: str) -> str:
        """Adds text to what is held back, and lets go of what belongs to no stop string."""
        text = self._held + text
        places = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
