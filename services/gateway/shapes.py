"""OpenAI's objects: the formats of completions and of chat completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qaq.v1 import common_pb2

from services.gateway import logprobs
from services.gateway.logprobs import CompletionLogprobs

Json = dict[str, Any]


@dataclass
class Piece:
    """The addition of one message to one choice.

    Attributes:
        begins: it is the choice's first.
        tokens: with log-probabilities, if they are requested.
        prompt: tokens of the prompt that came before the first piece, and `echo`, their text in the answer.
        calls: tool calls in OpenAI's format, each with its index.
    """

    text: str = ""
    tokens: list[common_pb2.TokenInfo] = field(default_factory=list)
    reason: str | None = None
    begins: bool = False
    prompt: list[common_pb2.TokenInfo] = field(default_factory=list)
    echo: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.text or self.tokens or self.reason or self.prompt or self.reasoning or self.calls)


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
        self._lengths: Counter[int] = Counter()

    def choice(self, index: int, piece: Piece) -> Json:
        more: Json = {}
        if self._prompt_top is not None:
            more["prompt_logprobs"] = logprobs.prompt(piece.prompt, self._prompt_top)
        return self._choice(index, piece, True) | more

    def delta(self, index: int, piece: Piece) -> Json:
        return self._choice(index, piece, piece.reason is not None)

    def openings(self, choices: int) -> Iterable[Json]:
        return ()

    def more(self, whole: Sequence[Piece]) -> Json:
        return {}

    def _choice(self, index: int, piece: Piece, ended: bool) -> Json:
        self._lengths[index] += len(piece.text)
        told = None
        if self._top is not None:
            if index not in self._logprobs:
                echoed = piece.prompt if self._echo else []
                self._logprobs[index] = CompletionLogprobs(echoed, piece.echo, self._top)
            told = self._logprobs[index].of(piece.tokens, self._lengths[index], ended)
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
        content = piece.text if piece.text or not piece.calls else None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.calls:
            message["tool_calls"] = [{key: value for key, value in c.items() if key != "index"} for c in piece.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs.chat(piece.tokens),
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
