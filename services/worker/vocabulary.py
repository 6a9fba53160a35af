"""The bytes that a token stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}


class Vocabulary:
    """What each token stands for, alone and byte by byte.

    A token may be a part of a character. Its bytes are then not valid UTF-8, but those of all tokens of the character
    join to it.

    Args:
        backend: see `text.tokenizer_backend`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        parts = list(_decoders(json.loads(backend.to_str()).get("decoder")))
        kinds = {part["type"] for part in parts}
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._spaces = [space for part in parts if (space := _space(part))]

    def bytes_of(self, token: int) -> bytes:
        """The token's own bytes; empty for an id that the tokenizer does not have."""
        if token in self._added:
            return str(self._added[token].content).encode()
        written = self._backend.id_to_token(token)
        if written is None:
            return b""
        if self._byte_level:
            return b"".join(_byte(character) for character in written)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(written)):
            return bytes([int(match[1], 16)])
        if self._spaces:  # decoded alone, a token loses its leading space
            for space in self._spaces:
                written = written.replace(space, " ")
            return written.encode()
        return str(self._backend.decode([token], skip_special_tokens=False)).encode()

    def is_special(self, token: int) -> bool:
        """Whether decoding an answer leaves the token out."""
        return token in self._added and bool(self._added[token].special)


def _decoders(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a tokenizer's decoder."""
    if decoder is None:
        return
    if decoder["type"] != "Sequence":
        yield decoder
    for part in decoder.get("decoders", ()):
        yield from _decoders(part)


def _space(decoder: dict[str, Any]) -> str:
    """What a step of a decoder turns into a space; empty if it does not."""
    if decoder["type"] == "Metaspace":
        return str(decoder["replacement"])
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return str(decoder["pattern"].get("String", ""))
    return ""


def _byte(character: str) -> bytes:
    """A character of the byte-level alphabet as its byte; others, which only added tokens have, as they are."""
    byte = _ALPHABET.get(character)
    return character.encode() if byte is None else bytes([byte])
