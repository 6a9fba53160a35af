"""Log-probabilities of tokens, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from qaq.v1 import common_pb2

# Positions whose log-probabilities are computed at a time: each takes one float32 per vocabulary entry.
_CHUNK_POSITIONS = 32


class Logprobs:
    """Describes tokens as a request asks for.

    Args:
        backend: see `text.tokenizer_backend`.

    Attributes:
        requested: whether tokens carry log-probabilities.
    """

    def __init__(self, params: common_pb2.OutputParams, backend: Any) -> None:
        self.requested = params.logprobs
        self._top = params.top_logprobs
        self._backend = backend

    def token_info(self, token: int, logprob: float | None = None) -> common_pb2.TokenInfo:
        """A token with its text, and its log-probability if given."""
        text = self._backend.decode([token], skip_special_tokens=False)
        return common_pb2.TokenInfo(token_id=token, text=text, logprob=logprob)

    def of(self, tokens: Sequence[int], logits: torch.Tensor) -> Iterator[common_pb2.TokenInfo]:
        """Tokens with their log-probabilities and the most likely alternatives.

        Args:
            logits: float [tokens, vocabulary], before any processing; row i predicts token i.
        """
        for start in range(0, len(tokens), _CHUNK_POSITIONS):
            part = tokens[start : start + _CHUNK_POSITIONS]
            scores = logits[start : start + _CHUNK_POSITIONS].float().log_softmax(-1)
            logprobs = scores.gather(1, torch.tensor(part, device=logits.device)[:, None])[:, 0].tolist()
            top_logprobs, top_ids = (top.tolist() for top in scores.topk(self._top, -1))
            for token, logprob, *top in zip(part, logprobs, top_ids, top_logprobs, strict=True):
                info = self.token_info(token, logprob)
                info.top.extend(self.token_info(*pair) for pair in zip(*top, strict=True))
                yield info
