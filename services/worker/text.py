"""Incremental detokenization: text without incomplete characters, and without what may belong to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from qaq_core.base.errors import UnsupportedModelError

# Decoders look back a few tokens: a word's leading space depends on the word before.
_CONTEXT_TOKENS = 8
_REPLACEMENT = "\ufffd"


def tokenizer_backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` of a transformers tokenizer.

    Raises:
        UnsupportedModelError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError("the tokenizer cannot decode incrementally; convert it to a tokenizer.json")
    return backend


class TextStream:
    """Text of one generation.

    Args:
        backend: from `tokenizer_backend`.
        prompt: tokens before the generation.
        stop: strings that end the text; what follows is not returned.
        include_stop: the string that ends the text is returned.
        special_tokens: keep the text of special tokens.

    Attributes:
        stop_found: the stop string that ended the text, or None.
    """

    def __init__(
        self,
        backend: Any,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        special_tokens: bool = False,
    ) -> None:
        self._backend, self._skip = backend, not special_tokens
        self._decoder = DecodeStream(ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=self._skip)
        self._undecoded: list[int] = []
        self._held = ""
        self._stop, self._include_stop = tuple(stop), include_stop
        self._may_stop = True
        self.stop_found: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that became final with this token; may be empty.

        Args:
            may_stop: stop strings are looked for in this token's text, and in later text.
        """
        if self.stop_found is not None:
            return ""
        self._may_stop = may_stop
        text = self._decoder.step(self._backend, token)
        if text is None:
            self._undecoded.append(token)
            return ""
        self._undecoded.clear()
        return self._filter(text)

    def finish(self) -> str:
        """The text that was held back until the end."""
        if self.stop_found is not None:
            return ""
        rest = self._backend.decode(self._undecoded, skip_special_tokens=self._skip)
        whole = rest.rstrip(_REPLACEMENT)  # a character that the end cuts is no text to find a stop string in
        text = self._filter(whole)
        if self.stop_found is not None:
            return text
        text, self._held = text + self._held + rest[len(whole) :], ""
        return text

    def _filter(self, text: str) -> str:
        """Appends text to the held-back text and returns the part that cannot belong to a stop string."""
        text = self._held + text
        if not self._may_stop:
            return text
        matches = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            at, self.stop_found = min(matches)
            self._held = ""
            return text[: at + len(self.stop_found)] if self._include_stop else text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
