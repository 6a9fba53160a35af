"""How the next token is chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from qaq.v1 import common_pb2
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.common.errors import InvalidArgument


class Sampler:
    """Chooses tokens of one sequence with transformers' own processors.

    Args:
        params: unset fields take the model's defaults; no temperature there either means greedy.
        defaults: the model's generation config.
    Raises:
        InvalidArgument: a parameter is out of range.
    """

    def __init__(self, params: common_pb2.SamplingParams, defaults: Any, device: torch.device) -> None:
        def setting(name: str) -> Any:
            return getattr(params, name) if params.HasField(name) else getattr(defaults, name, None)

        default_temperature = (defaults.temperature or 1.0) if defaults.do_sample else 0.0
        temperature = params.temperature if params.HasField("temperature") else default_temperature
        chosen = {name: setting(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
        for name, value in {"temperature": temperature, **chosen}.items():
            if value is not None and not math.isfinite(value):
                raise InvalidArgument(f"sampling.{name} is {value}; send a finite number")
        if temperature < 0:
            raise InvalidArgument(f"sampling.temperature is {temperature}; send 0 for greedy, or more")
        self.greedy = temperature == 0
        penalty = chosen["repetition_penalty"]
        self._penalty = None
        self._warpers = LogitsProcessorList()
        try:
            if penalty is not None and penalty != 1:
                self._penalty = RepetitionPenaltyLogitsProcessor(float(penalty))
            if not self.greedy:
                self._add_warpers(temperature, chosen["top_k"], chosen["top_p"], chosen["min_p"])
        except ValueError as error:
            raise InvalidArgument(f"sampling parameters are out of range: {error}") from error
        self._generator = torch.Generator(device)
        if params.HasField("seed"):
            self._generator.manual_seed(params.seed)
        else:
            self._generator.seed()

    def _add_warpers(
        self, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
    ) -> None:
        if temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warpers.append(TopKLogitsWarper(int(top_k)))
        if top_p is not None and top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        if min_p:
            self._warpers.append(MinPLogitsWarper(float(min_p)))

    def choose(self, logits: torch.Tensor, tokens: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: float [vocabulary], of the last position.
            tokens: everything so far, prompt included.
        Raises:
            RuntimeError: the logits are no distribution (NaN).
        """
        scores = logits[None].float()
        seen = torch.empty(1, 0, dtype=torch.long)
        if self._penalty is not None:
            seen = torch.tensor([tokens], device=logits.device)
            scores = self._penalty(seen, scores)
        if self.greedy:
            best = scores.argmax(-1)
            # NaN wins argmax, so looking at the winner is enough.
            if not bool(torch.isfinite(scores[0, best[0]])):
                raise RuntimeError("the model's logits are not finite")
            return int(best)
        probabilities = self._warpers(seen, scores).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
