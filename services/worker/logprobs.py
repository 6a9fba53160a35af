"""How likely tokens were, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from qaq.v1 import common_pb2

# Positions whose log-probabilities are computed at once: a row is a float32 for every word of the vocabulary.
_ROWS = 32


class Likelihood:
    """Describes tokens as a request asks for.

    Args:
        backend: see `text.backend_of`.
    """

    def __init__(self, params: common_pb2.OutputParams, backend: Any) -> None:
        self.wanted = params.logprobs
        self._top = params.top_logprobs
        self._backend = backend

    def plain(self, token: int) -> common_pb2.TokenInfo:
        """A token without its likelihood."""
        text = self._backend.decode([token], skip_special_tokens=False)
        return common_pb2.TokenInfo(token_id=token, text=text)

    def of(self, tokens: Sequence[int], logits: torch.Tensor) -> Iterator[common_pb2.TokenInfo]:
        """Tokens with their log-probabilities.

        Args:
            logits: float [tokens, vocabulary], before any processing; row i is what token i was one of.
        """
        for start in range(0, len(tokens), _ROWS):
            part = tokens[start : start + _ROWS]
            scores = logits[start : start + _ROWS].float().log_softmax(-1)
            own = scores.gather(1, torch.tensor(part, device=logits.device)[:, None])[:, 0].tolist()
            values, ids = (top.tolist() for top in scores.topk(self._top, -1))
            for token, logprob, likeliest, near in zip(part, own, ids, values, strict=True):
                info = self.plain(token)
                info.logprob = logprob
                info.top.extend(self._alternative(*pair) for pair in zip(likeliest, near, strict=True))
                yield info

    def _alternative(self, token: int, logprob: float) -> common_pb2.TokenInfo:
        info = self.plain(token)
        info.logprob = logprob
        return info
