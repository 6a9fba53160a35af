"""Converts messages of the gRPC API to OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qaq.v1 import common_pb2, generate_pb2

from services.gateway import logprobs
from services.gateway.logprobs import CompletionLogprobs
from services.gateway.usage import UsageCounter

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
        begins: it is the choice's first.
        tokens: with log-probabilities, if they are requested.
        prompt: tokens of the prompt that came before the first piece, and `echo`, their text in the answer.
    """

    text: str = ""
    tokens: list[common_pb2.TokenInfo] = field(default_factory=list)
    reason: str | None = None
    begins: bool = False
    prompt: list[common_pb2.TokenInfo] = field(default_factory=list)
    echo: str = ""

    @property
    def empty(self) -> bool:
        return not (self.text or self.tokens or self.reason or self.prompt)


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

    def more(self, whole: Sequence[Piece]) -> Json:
        """Fields of a whole answer beside its choices."""
        ...


class Answer:
    """One answer with all its choices.

    Args:
        choices: number of choices of each prompt. Those of prompt i begin at index i · choices.
        echo: for each prompt, the text that its choices begin with (None: the text of the echoed tokens). None: no
            echo.
    """

    def __init__(
        self, shape: Shape, model: common_pb2.ModelInfo, choices: int, echo: Sequence[str | None] | None = None
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

    async def collect(self, replies: Replies, prompts: int) -> Json:
        """The whole answer."""
        whole = [Piece() for _ in range(prompts * self._choices)]
        async for place, reply in replies:
            for index, piece in self._pieces(place, reply):
                whole[index].text += piece.text
                whole[index].tokens += piece.tokens
                whole[index].reason = piece.reason
                if piece.begins:
                    whole[index].prompt, whole[index].echo = piece.prompt, piece.echo
        choices = [self._shape.choice(index, piece) for index, piece in enumerate(whole)]
        return self._object(self._shape.whole, choices) | self._shape.more(whole) | {"usage": self._usage.total()}

    async def chunks(self, replies: Replies, prompts: int, usage: bool, continuous: bool) -> AsyncGenerator[Json, None]:
        """The answer in chunks. The last one has the usage if `usage` is set, each has that so far if `continuous`."""
        opened = False

        def chunk(choice: Json) -> Json:
            more: Json = {"usage": self._usage.so_far() if continuous else None} if usage or continuous else {}
            return self._object(self._shape.part, [choice]) | more

        async for place, reply in replies:
            pieces = list(self._pieces(place, reply))
            if not opened:  # only when the router has accepted the request: an error before is no stream
                for choice in self._shape.openings(prompts * self._choices):
                    yield chunk(choice)
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
        return index, piece

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return self._facts | {"object": kind, "choices": choices}


class Completion:
    """The format of `/v1/completions`.

    Args:
        top: alternatives of each token, None without log-probabilities.
        echo: the text and the log-probabilities begin with the prompt.
        prompt_top: alternatives of each token of the prompt in `prompt_logprobs`; None leaves it out.
    """

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, top: int | None = None, echo: bool = False, prompt_top: int | None = None) -> None:
        self._top, self._echo, self._prompt_top = top, echo, prompt_top
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def choice(self, index: int, piece: Piece) -> Json:
        more: Json = {}
        if self._prompt_top is not None:
            more["prompt_logprobs"] = logprobs.prompt(piece.prompt, self._prompt_top)
        return self._choice(index, piece, len(piece.text)) | more

    def delta(self, index: int, piece: Piece) -> Json:
        return self._choice(index, piece)

    def openings(self, choices: int) -> Iterable[Json]:
        return ()

    def more(self, whole: Sequence[Piece]) -> Json:
        return {}

    def _choice(self, index: int, piece: Piece, length: int | None = None) -> Json:
        told = None
        if self._top is not None:
            if index not in self._logprobs:
                echoed = piece.prompt if self._echo else []
                self._logprobs[index] = CompletionLogprobs(echoed, piece.echo, self._top)
            told = self._logprobs[index].of(piece.tokens, length)
        return {"index": index, "text": piece.text, "logprobs": told, "finish_reason": piece.reason}


class Chat:
    """The format of `/v1/chat/completions`.

    Args:
        prompt_top: as for `Completion`.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, prompt_top: int | None = None) -> None:
        self._prompt_top = prompt_top

    def choice(self, index: int, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs.chat(piece.tokens),
            "finish_reason": piece.reason,
        }

    def delta(self, index: int, piece: Piece) -> Json:
        change = {"content": piece.text} if piece.text else {}
        return {
            "index": index,
            "delta": change,
            "logprobs": logprobs.chat(piece.tokens),
            "finish_reason": piece.reason,
        }

    def openings(self, choices: int) -> Iterable[Json]:
        for index in range(choices):
            delta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def more(self, whole: Sequence[Piece]) -> Json:
        return (
            {} if self._prompt_top is None else {"prompt_logprobs": logprobs.prompt(whole[0].prompt, self._prompt_top)}
        )
