"""Log-probabilities of tokens in the formats of completions, of chats, and of prompts."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from qaq.v1.common_pb2 import TokenInfo

_LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's API uses this value

Json = dict[str, Any]


def text_of(tokens: Iterable[TokenInfo]) -> str:
    """The text of tokens that follow each other, special ones included."""
    return b"".join(info.bytes for info in tokens).decode(errors="replace")


def chat(tokens: Sequence[TokenInfo]) -> Json | None:
    """Of `/v1/chat/completions`."""
    if not tokens:
        return None
    listed = [_told(info) | {"top_logprobs": [_told(near) for near in info.top]} for info in tokens]
    return {"content": listed, "refusal": None}


def prompt(tokens: Sequence[TokenInfo], top: int) -> list[Json | None]:
    """`prompt_logprobs` as vLLM has it: for each token of a prompt, itself and the `top` most likely ones by their ids.

    The first token of a text has none.
    """
    return [_ranked(info, top) if info.HasField("logprob") else None for info in tokens]


class CompletionLogprobs:
    """Of `/v1/completions`, for one choice whose tokens arrive in order.

    `text_offset` is where a token's first whole character begins in the choice's text. A special token has no text.
    Nor has a token of a stop string; its offset is the text's end. Whether a token is of one is known when its text
    arrives, or the end, so in a stream tokens wait for their text.

    Args:
        echoed: tokens that the text begins with.
        text: what they are in the choice's text: without special tokens that the tokenizer has added.
        top: the number of alternatives.
    """

    def __init__(self, echoed: Sequence[TokenInfo], text: str, top: int) -> None:
        self._top = top
        offsets = _offsets_within(echoed, text)
        self._waiting = list(zip(echoed, offsets, strict=True))
        self._length = len(text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, generated: Sequence[TokenInfo], length: int, ended: bool = True) -> Json | None:
        """The next tokens, after the echoed ones at the first call; None if there are none.

        Args:
            length: of the text so far.
            ended: the text has ended. Otherwise tokens that begin behind it wait for a later call.
        """
        for info in generated:
            start, self._length = _placed(self._decoder, self._length, b"" if info.special else info.bytes)
            self._waiting.append((info, start))
        told, self._waiting = self._waiting, []
        while told and not ended and told[-1][1] >= length:
            self._waiting.insert(0, told.pop())
        if not told:
            return None
        tokens = [info for info, _ in told]
        return {
            "tokens": [_name(info) for info in tokens],
            "token_logprobs": [_logprob(info) for info in tokens],
            "top_logprobs": [self._alternatives(info) if info.HasField("logprob") else None for info in tokens],
            "text_offset": [min(offset, length) for _, offset in told],
        }

    def _alternatives(self, info: TokenInfo) -> dict[str, float | None]:
        """The most likely tokens and the sampled one. Of several tokens with one text, others go by their ids."""
        named = {}
        top = list(info.top[: self._top])
        if all(near.token_id != info.token_id for near in top):
            top.append(info)
        for near in top:
            name = _name(near)
            taken = name in named or (name == _name(info) and near.token_id != info.token_id)
            named[f"token_id:{near.token_id}" if taken else name] = _logprob(near)
        return named


def _offsets_within(tokens: Sequence[TokenInfo], text: str) -> list[int]:
    """Where the tokens of a prompt begin in its text. Their own text may have more around it."""
    decoder, offsets, at = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
    for info in tokens:
        start, at = _placed(decoder, at, info.bytes)
        offsets.append(start)
    added = max(0, text_of(tokens).find(text))
    return [min(max(0, offset - added), len(text)) for offset in offsets]


def _placed(decoder: codecs.IncrementalDecoder, at: int, data: bytes) -> tuple[int, int]:
    """Where the character of a token's first byte begins, and the length of the text with the token.

    Args:
        decoder: has decoded the text before, which is `at` characters; it may hold the beginning of another one.
    """
    pending = decoder.getstate()[0]
    first = decoder.decode(data[:1])
    # A byte that does not continue what is pending makes one replacement character of it.
    broken = bool(pending and data) and (len(first) == 2 or decoder.getstate()[0] == data[:1])
    return at + broken, at + len(first) + len(decoder.decode(data[1:]))


def _ranked(info: TokenInfo, top: int) -> Json:
    listed = {str(near.token_id): _entry(near, rank) for rank, near in enumerate(info.top[:top], start=1)}
    return {str(info.token_id): _entry(info, info.rank)} | listed


def _entry(info: TokenInfo, rank: int) -> Json:
    return {"logprob": _logprob(info), "rank": rank, "decoded_token": info.text}


def _told(info: TokenInfo) -> Json:
    return {"token": info.text, "logprob": _logprob(info), "bytes": list(info.bytes)}


def _name(info: TokenInfo) -> str:
    """A token's text; the bytes of a part of a character, as OpenAI's API writes them."""
    try:
        return info.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in info.bytes)


def _logprob(info: TokenInfo) -> float | None:
    return max(info.logprob, _LEAST_LOGPROB) if info.HasField("logprob") else None
