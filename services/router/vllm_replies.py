"""Makes responses of vLLM's engine protocol of the messages of a generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from qaq.v1 import common_pb2, generate_pb2
from smg_grpc_proto import vllm_engine_pb2

Response: TypeAlias = vllm_engine_pb2.GenerateResponse


@dataclass
class _Choice:
    """What was generated of one choice."""

    token_ids: list[int] = field(default_factory=list)
    infos: list[common_pb2.TokenInfo] = field(default_factory=list)


class Answer:
    """The responses of one generation: a chunk for each token if they are to be streamed, then one for each choice
    with all of it.

    Args:
        stream: send chunks.
        choices: number of choices.
    """

    def __init__(self, *, stream: bool, choices: int) -> None:
        self._stream = stream
        self._open = set(range(choices))
        self._choices: defaultdict[int, _Choice] = defaultdict(_Choice)
        self._prompt: list[common_pb2.TokenInfo] = []
        self._prompt_tokens = 0

    def of(self, reply: generate_pb2.GenerateReply) -> Iterator[Response]:
        """The responses that one message makes: none or one."""
        match reply.WhichOneof("event"):
            case "prefill":
                self._prompt_tokens = reply.prefill.tokens_total
            case "prompt":
                self._prompt.extend(reply.prompt.tokens)
            case "token":
                yield from self._token(reply.token)
            case "finished":
                yield self._finished(reply.finished)

    def aborted(self) -> Iterator[Response]:
        """The last responses of the choices that have not finished."""
        for index in sorted(self._open):
            yield self._complete(index, finish_reason="abort", prompt_tokens=self._prompt_tokens)
        self._open.clear()

    def _token(self, token: common_pb2.Token) -> Iterator[Response]:
        choice = self._choices[token.choice]
        choice.token_ids.append(token.token_id)
        if token.HasField("info"):
            choice.infos.append(token.info)
        if not self._stream:
            return
        chunk = vllm_engine_pb2.GenerateStreamChunk(
            token_ids=[token.token_id],
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(choice.token_ids),
            output_logprobs=_output_logprobs([token.info] if token.HasField("info") else []),
            input_logprobs=self._input_logprobs() if len(choice.token_ids) == 1 else None,
            index=token.choice,
        )
        yield Response(chunk=chunk)

    def _finished(self, finished: common_pb2.Finished) -> Response:
        self._open.discard(finished.choice)
        length = finished.reason == common_pb2.FINISH_REASON_LENGTH
        response = self._complete(
            finished.choice,
            finish_reason="length" if length else "stop",
            prompt_tokens=finished.usage.prompt_tokens,
            cached_tokens=finished.usage.loaded_tokens + finished.usage.kept_tokens,
        )
        # The end-of-sequence token ends an answer without having been asked for.
        if finished.reason == common_pb2.FINISH_REASON_STOP:
            if finished.HasField("stop_string"):
                response.complete.matched_stop_str = finished.stop_string
            else:
                response.complete.matched_token_id = finished.stop_token_id
        return response

    def _complete(self, index: int, *, finish_reason: str, prompt_tokens: int, cached_tokens: int = 0) -> Response:
        choice = self._choices[index]
        complete = vllm_engine_pb2.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(choice.token_ids),
            cached_tokens=cached_tokens,
            output_logprobs=_output_logprobs(choice.infos),
            input_logprobs=self._input_logprobs(),
            index=index,
        )
        return Response(complete=complete)

    def _input_logprobs(self) -> vllm_engine_pb2.InputLogProbs | None:
        if not self._prompt:
            return None
        values = [
            vllm_engine_pb2.InputTokenLogProb(value=info.logprob if info.HasField("logprob") else None)
            for info in self._prompt
        ]
        return vllm_engine_pb2.InputLogProbs(
            token_logprobs=values,
            token_ids=[info.token_id for info in self._prompt],
            top_logprobs=_top(self._prompt),
        )


def _output_logprobs(infos: list[common_pb2.TokenInfo]) -> vllm_engine_pb2.OutputLogProbs | None:
    if not infos:
        return None
    return vllm_engine_pb2.OutputLogProbs(
        token_logprobs=[info.logprob for info in infos],
        token_ids=[info.token_id for info in infos],
        top_logprobs=_top(infos),
    )


def _top(infos: Iterable[common_pb2.TokenInfo]) -> Iterator[vllm_engine_pb2.TopLogProbs]:
    """The most likely tokens of each position, most likely first."""
    for info in infos:
        yield vllm_engine_pb2.TopLogProbs(
            values=[each.logprob for each in info.top], token_ids=[each.token_id for each in info.top]
        )
