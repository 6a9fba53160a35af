"""How many tokens a text has at least, without tokenizing it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

_COMPOSED = 3
"""Bytes that Unicode's canonical composition (NFC) may make one of, at most."""


def bytes_to_unicode() -> dict[int, str]:
    """The characters of byte-level vocabularies. What imports this module may have to say first that transformers
    shall do without torch."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode as alphabet  # the package has a function so named

    characters: dict[int, str] = alphabet()
    return characters


# Steps of a tokenizer, as tokenizers writes them, that lose no byte of a text.
_KEEPS = {"ByteLevel", "Digits", "Metaspace", "Prepend", "Replace", "NFC", "Split", "Punctuation", "Sequence"}

Step = Mapping[str, Any]


class LeastTokens:
    """The fewest tokens of a text: its bytes, divided by those of the longest token.

    That holds where each byte of a text is in one of its tokens: of byte-level vocabularies, but for the bytes that
    they lack, and of those with a token for every byte. Of others nothing is known, and the answer is 0.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._longest, self._dropped = (0, b"") if backend is None else _known(json.loads(backend.to_str()))

    def of(self, text: str) -> int:
        return -(-len(text.encode().translate(None, self._dropped)) // self._longest) if self._longest else 0


def _known(described: Step) -> tuple[int, bytes]:
    """How many bytes of a text one token may stand for, at most, 0 if that is not known; and the bytes that no token
    has, which are left out."""
    model = described["model"]
    steps = [*_steps(described["normalizer"]), *_steps(described["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    added = described["added_tokens"]
    if (
        model.get("type") not in ("BPE", "Unigram")
        or not kinds <= _KEEPS
        or any(map(_loses, steps))
        or described["truncation"]
        or any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return 0, b""
    vocab = model["vocab"]
    tokens = set(vocab) if isinstance(vocab, dict) else {token for token, _ in vocab}
    dropped = b""
    if "ByteLevel" in kinds:
        dropped = bytes(byte for byte, sign in bytes_to_unicode().items() if sign not in tokens)
        if dropped and "NFC" in kinds:
            return 0, b""  # it may compose such bytes of others
        longest = max(map(len, tokens))  # a character is a byte
    elif model.get("byte_fallback") and tokens.issuperset(f"<0x{byte:02X}>" for byte in range(256)):
        longest = max(len(token.encode()) for token in tokens)
    else:
        return 0, b""
    longest = max([longest, *(len(token["content"].encode()) for token in added)])
    return longest * (_COMPOSED if "NFC" in kinds else 1), dropped


def _steps(step: Step | None) -> Iterator[Step]:
    """A normalizer or pre-tokenizer, and the steps that it consists of."""
    if step is None:
        return
    yield step
    for part in step.get("normalizers") or step.get("pretokenizers") or ():
        yield from _steps(part)


def _loses(step: Step) -> bool:
    """Whether a step may leave bytes out."""
    if step["type"] == "Replace":
        replaced = step["pattern"].get("String")
        return replaced is None or len(step["content"].encode()) < len(replaced.encode())
    return step.get("behavior") == "Removed"
