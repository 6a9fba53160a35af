"""Converts messages of the gRPC API to OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any

from qaq.v1 import common_pb2, generate_pb2

from services.gateway import logprobs
from services.gateway.answers import AnswerReader
from services.gateway.shapes import Piece, Shape
from services.gateway.tools import Readers
from services.gateway.usage import UsageCounter

_REASONS = {
    common_pb2.FINISH_REASON_EOS: "stop",
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
}

Json = dict[str, Any]
Replies = AsyncIterator[tuple[int, generate_pb2.GenerateReply]]


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
        model: common_pb2.ModelInfo,
        choices: int,
        echo: Sequence[str | None] | None = None,
        readers: Readers | None = None,
    ) -> None:
        self._shape, self._choices, self._echo = shape, choices, echo
        self._facts = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"fp_{model.fingerprint[:12]}",
        }
        self._begun: set[int] = set()
        self._prompts: dict[int, list[common_pb2.TokenInfo]] = {}
        self._usage = UsageCounter()
        self._make_reader, self._opening = readers, ""
        self._readers: dict[int, AnswerReader] = {}
        self._calls: Counter[int] = Counter()  # tool calls of each choice

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
                if piece.begins:
                    whole[index].prompt, whole[index].echo = piece.prompt, piece.echo
        choices = [self._shape.choice(index, piece) for index, piece in enumerate(whole)]
        return self._object(self._shape.whole, choices) | self._shape.more(whole) | {"usage": self._usage.total()}

    async def chunks(self, replies: Replies, prompts: int, usage: bool, continuous: bool) -> AsyncGenerator[Json, None]:
        """The answer in chunks. With `usage`, the last one has the usage, and with `continuous` each that so far."""
        opened = False

        def chunk(choice: Json) -> Json:
            more: Json = {"usage": self._usage.so_far() if continuous else None} if usage else {}
            return self._object(self._shape.part, [choice]) | more

        async for place, reply in replies:
            # Only when the router has accepted the request: an error before is no stream. Their usage is without the
            # token of this message.
            openings = [] if opened else [chunk(each) for each in self._shape.openings(prompts * self._choices)]
            pieces = list(self._pieces(place, reply))
            for each in openings:
                yield each
            opened = True
            for index, piece in pieces:
                if not piece.empty:
                    yield chunk(self._shape.delta(index, piece))
        if usage:
            yield self._object(self._shape.part, []) | {"usage": self._usage.total()}

    def _pieces(self, place: int, reply: generate_pb2.GenerateReply) -> Iterable[tuple[int, Piece]]:
        """The pieces of a message of the prompt at index `place`."""
        self._usage.add(place, reply)
        match reply.WhichOneof("event"):
            case "opening":
                self._opening = reply.opening.text
                self._reader(place * self._choices)  # it may refuse
            case "prompt":
                self._prompts.setdefault(place, []).extend(reply.prompt.tokens)
            case "token":
                token = reply.token
                piece = Piece(token.text, [token.info] if token.HasField("info") else [])
                yield self._opened(place, token.choice, piece)
            case "finished":
                end = reply.finished
                yield self._opened(place, end.choice, Piece(end.text, [], _REASONS.get(end.reason, "stop")))

    def _opened(self, place: int, choice: int, piece: Piece) -> tuple[int, Piece]:
        """The index of the choice, and the piece, after the echoed prompt if it is the first."""
        index = place * self._choices + choice
        if index not in self._begun:
            self._begun.add(index)
            piece.begins, piece.prompt = True, self._prompts.get(place, [])
            if self._echo is not None:
                text = self._echo[place]
                piece.echo = logprobs.text_of(piece.prompt) if text is None else text
                piece.text = piece.echo + piece.text
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
            piece.calls.append({"index": self._calls[index], **call})
            self._calls[index] += 1
        if piece.reason == "stop" and self._calls[index]:
            piece.reason = "tool_calls"

    def _reader(self, index: int) -> AnswerReader:
        assert self._make_reader is not None
        if index not in self._readers:
            self._readers[index] = self._make_reader(self._opening)
        return self._readers[index]

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return self._facts | {"object": kind, "choices": choices}
