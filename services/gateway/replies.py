"""Converts messages of the gRPC API to OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qaq.v1 import common_pb2, generate_pb2

from services.gateway.answers import AnswerReader
from services.gateway.tools import Readers

_LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI's API uses this value
_REASONS = {
    common_pb2.FINISH_REASON_EOS: "stop",
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}

Json = dict[str, Any]
Replies = AsyncIterator[tuple[int, generate_pb2.GenerateReply]]


@dataclass
class Piece:
    """The addition of one message to one choice.

    Attributes:
        calls: tool calls in OpenAI's format, each with its index.
    """

    text: str = ""
    tokens: list[common_pb2.TokenInfo] = field(default_factory=list)
    reason: str | None = None
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)


class Shape(Protocol):
    """The format of completions or of chat completions."""

    prefix: str
    whole: str
    part: str

    def choice(self, index: int, piece: Piece) -> Json:
        """A choice of a whole answer."""
        ...

    def delta(self, index: int, piece: Piece) -> Json:
        """A choice of a chunk."""
        ...

    def openings(self, choices: int) -> Iterable[Json]:
        """The choices of the chunks before the first piece."""
        ...


class Answer:
    """One answer with all its choices.

    Args:
        choices: number of choices of each prompt. Those of prompt i begin at index i · choices.
        echo: for each prompt, the text that its choices begin with (None: the text of the echoed tokens). None: no
            echo.
        readers: makes the readers of the choices' texts, if these are not plain.
    """

    def __init__(
        self,
        shape: Shape,
        model: str,
        choices: int,
        echo: Sequence[str | None] | None = None,
        readers: Readers | None = None,
    ) -> None:
        self._make_reader, self._opening = readers, ""
        self._readers: dict[int, AnswerReader] = {}
        self._calls: dict[int, int] = {}  # tool calls of each choice
        self._shape, self._choices = shape, choices
        self._id, self._created, self._model = f"{shape.prefix}-{uuid.uuid4().hex}", int(time.time()), model
        self._echo = echo
        self._begun: set[int] = set()
        self._echoed: dict[int, list[common_pb2.TokenInfo]] = {}
        self._finished: list[tuple[int, common_pb2.Usage]] = []

    async def collect(self, replies: Replies, prompts: int) -> Json:
        """The whole answer."""
        whole = [Piece() for _ in range(prompts * self._choices)]
        async for place, reply in replies:
            for index, piece in self._pieces(place, reply):
                whole[index].text += piece.text
                whole[index].tokens += piece.tokens
                whole[index].reason = piece.reason
                whole[index].reasoning += piece.reasoning
                whole[index].calls += piece.calls
        choices = [self._shape.choice(index, piece) for index, piece in enumerate(whole)]
        return self._object(self._shape.whole, choices) | {"usage": self._usage()}

    async def chunks(self, replies: Replies, prompts: int, usage: bool) -> AsyncIterator[Json]:
        """The answer in chunks. The last one has the usage if `usage` is set."""
        more: Json = {"usage": None} if usage else {}
        opened = False
        async for place, reply in replies:
            pieces = list(self._pieces(place, reply))
            if not opened:  # only when the router has accepted the request: an error before is no stream
                for choice in self._shape.openings(prompts * self._choices):
                    yield self._object(self._shape.part, [choice]) | more
                opened = True
            for index, piece in pieces:
                if piece != Piece():
                    yield self._object(self._shape.part, [self._shape.delta(index, piece)]) | more
        if usage:
            yield self._object(self._shape.part, []) | {"usage": self._usage()}

    def _pieces(self, place: int, reply: generate_pb2.GenerateReply) -> Iterable[tuple[int, Piece]]:
        """The pieces of a message of the prompt at index `place`."""
        match reply.WhichOneof("event"):
            case "opening":
                self._opening = reply.opening.text
                self._reader(place * self._choices)  # it may refuse
            case "prompt":
                self._echoed.setdefault(place, []).extend(reply.prompt.tokens)
            case "token":
                token = reply.token
                piece = Piece(token.text, [token.info] if token.HasField("info") else [])
                yield self._opened(place, token.choice, piece)
            case "finished":
                end = reply.finished
                self._finished.append((place, end.usage))
                yield self._opened(place, end.choice, Piece(end.text, [], _REASONS.get(end.reason, "stop")))

    def _opened(self, place: int, choice: int, piece: Piece) -> tuple[int, Piece]:
        """The index of the choice, and the piece, after the echoed prompt if it is the first."""
        index = place * self._choices + choice
        if self._echo is not None and index not in self._begun:
            echoed, text = self._echoed.get(place, []), self._echo[place]
            piece.text = ("".join(info.text for info in echoed) if text is None else text) + piece.text
            piece.tokens = [*echoed, *piece.tokens] if piece.tokens else []
        self._begun.add(index)
        if self._make_reader is not None:
            self._read(index, piece)
        return index, piece

    def _read(self, index: int, piece: Piece) -> None:
        """Splits the text of a piece into content, reasoning and tool calls."""
        reader = self._reader(index)
        parts = [reader.feed(piece.text)] + ([reader.finish()] if piece.reason else [])
        piece.text = "".join(part.content for part in parts)
        piece.reasoning = "".join(part.reasoning for part in parts)
        for call in (call for part in parts for call in part.calls):
            piece.calls.append({"index": self._calls.get(index, 0), **call})
            self._calls[index] = self._calls.get(index, 0) + 1
        if piece.reason == "stop" and self._calls.get(index):
            piece.reason = "tool_calls"

    def _reader(self, index: int) -> AnswerReader:
        assert self._make_reader is not None
        if index not in self._readers:
            self._readers[index] = self._make_reader(self._opening)
        return self._readers[index]

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> Json:
        """Tokens of all choices, each prompt counted once. `cache`, an extension, has sums over the choices."""
        prompt = sum({place: usage.prompt_tokens for place, usage in self._finished}.values())
        generated = sum(usage.generated_tokens for _, usage in self._finished)
        caches = [usage.cache for _, usage in self._finished]
        held = {name: sum(getattr(cache, name) for cache in caches) for name in ("kv_bytes", "kv_bytes_fp16")}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "cache": held | {"exceptions": sum(cache.exceptions for cache in caches)},
        }


class Completion:
    """The format of `/v1/completions`."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, piece: Piece) -> Json:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(index, piece.tokens),
            "finish_reason": piece.reason,
        }

    delta = choice

    def openings(self, choices: int) -> Iterable[Json]:
        return ()

    def _logprobs(self, index: int, tokens: Sequence[common_pb2.TokenInfo]) -> Json | None:
        if not tokens:
            return None
        offsets = []
        for info in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(info.text)
        return {
            "tokens": [info.text for info in tokens],
            "token_logprobs": [_logprob(info) for info in tokens],
            "top_logprobs": [
                {near.text: _logprob(near) for near in info.top} if info.HasField("logprob") else None
                for info in tokens
            ],
            "text_offset": offsets,
        }


class Chat:
    """The format of `/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, piece: Piece) -> Json:
        content = piece.text if piece.text or not piece.calls else None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.calls:
            message["tool_calls"] = [{key: value for key, value in c.items() if key != "index"} for c in piece.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": _content(piece.tokens),
            "finish_reason": piece.reason,
        }

    def delta(self, index: int, piece: Piece) -> Json:
        change: Json = {"content": piece.text} if piece.text else {}
        if piece.reasoning:
            change["reasoning_content"] = piece.reasoning
        if piece.calls:
            change["tool_calls"] = piece.calls
        return {
            "index": index,
            "delta": change,
            "logprobs": _content(piece.tokens),
            "finish_reason": piece.reason,
        }

    def openings(self, choices: int) -> Iterable[Json]:
        for index in range(choices):
            delta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _content(tokens: Sequence[common_pb2.TokenInfo]) -> Json | None:
    if not tokens:
        return None
    listed = [_told(info) | {"top_logprobs": [_told(near) for near in info.top]} for info in tokens]
    return {"content": listed, "refusal": None}


def _told(info: common_pb2.TokenInfo) -> Json:
    return {"token": info.text, "logprob": _logprob(info), "bytes": list(info.text.encode())}


def _logprob(info: common_pb2.TokenInfo) -> float | None:
    return max(info.logprob, _LEAST_LOGPROB) if info.HasField("logprob") else None
