"""Log-probabilities of tokens, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from qaq.v1 import common_pb2

from services.worker.vocabulary import Vocabulary

# Positions whose log-probabilities are computed at a time: each takes one float32 per vocabulary entry.
_CHUNK_POSITIONS = 32


class Logprobs:
    """Describes tokens as a request asks for.

    Attributes:
        requested: whether generated tokens carry log-probabilities.
        echoed: whether the prompt's tokens are returned. scores_prompt: with log-probabilities.
    """

    def __init__(self, params: common_pb2.OutputParams, vocabulary: Vocabulary) -> None:
        ranked = params.HasField("prompt_logprobs")
        self.requested = params.logprobs
        self.echoed = params.echo or ranked
        self.scores_prompt = ranked or (params.echo and params.logprobs)
        self._top, self._ranked = params.top_logprobs, ranked
        self._prompt_top = max(params.prompt_logprobs, params.top_logprobs if params.echo else 0)
        self._vocabulary = vocabulary

    def token_info(self, token: int, logprob: float | None = None) -> common_pb2.TokenInfo:
        """A token with its text, and its log-probability if given."""
        raw = self._vocabulary.bytes_of(token)
        special = self._vocabulary.is_special(token)
        text = raw.decode(errors="replace")
        return common_pb2.TokenInfo(token_id=token, text=text, bytes=raw, special=special, logprob=logprob)

    def generated(self, token: int, logits: torch.Tensor, error: float | None = None) -> common_pb2.TokenInfo:
        """A generated token; `logits`, float [vocabulary], are the model's own at its position, with that error."""
        info = next(self._of([token], logits[None], self._top, ranked=False))
        if error is not None:
            info.predicted_error = error
        return info

    def prompt(self, tokens: Sequence[int], logits: torch.Tensor) -> Iterator[common_pb2.TokenInfo]:
        """Tokens of a prompt; row i of `logits`, float [tokens, vocabulary], predicts token i."""
        return self._of(tokens, logits, self._prompt_top, self._ranked)

    def _of(
        self, tokens: Sequence[int], logits: torch.Tensor, top: int, ranked: bool
    ) -> Iterator[common_pb2.TokenInfo]:
        """Tokens with their log-probabilities, the `top` most likely alternatives, and their ranks if `ranked`."""
        for start in range(0, len(tokens), _CHUNK_POSITIONS):
            part = tokens[start : start + _CHUNK_POSITIONS]
            scores = logits[start : start + _CHUNK_POSITIONS].float().log_softmax(-1)
            own = scores.gather(1, torch.tensor(part, device=logits.device)[:, None])
            ranks = ((scores > own).sum(-1) + 1).tolist() if ranked else [0] * len(part)
            top_logprobs, top_ids = (best.tolist() for best in scores.topk(top, -1))
            rows = zip(part, own[:, 0].tolist(), ranks, top_ids, top_logprobs, strict=True)
            for token, logprob, rank, ids, logprobs in rows:
                info = self.token_info(token, logprob)
                info.rank = rank
                info.top.extend(self.token_info(*pair) for pair in zip(ids, logprobs, strict=True))
                yield info
