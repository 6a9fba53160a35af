"""Sampling of the next token."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from qaq.v1 import common_pb2
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.common.errors import InvalidArgument
from services.common.limits import MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY

MIN_TEMPERATURE = 1e-5
"""A lower temperature is greedy decoding. Logits over it would leave float32's range."""

_FLOATS = ("top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


class Sampler:
    """Samples the tokens of one choice, with transformers' logits processors where they exist.

    A token's random number depends only on the seed, the choice and the token's position, so a generation that moves
    to another worker continues with the same tokens.

    Args:
        params: unset fields take the model's defaults; without a default temperature, sampling is greedy.
        defaults: the model's generation config.
        choice: index among the choices of one prompt.
        prompt_tokens: tokens before the generated ones, which frequency and presence penalties do not count.
        min_new_tokens: none of the `ends` is sampled before this many tokens, except where a mask allows nothing else.
        ends: tokens that would end the generation.
        mask: rules tokens out after penalties and bias, before temperature and filters.
    Raises:
        InvalidArgument: a parameter is out of range.
    """

    def __init__(
        self,
        params: common_pb2.SamplingParams,
        defaults: Any,
        device: torch.device,
        choice: int = 0,
        prompt_tokens: int = 0,
        min_new_tokens: int = 0,
        ends: Collection[int] = (),
        mask: LogitsProcessor | None = None,
    ) -> None:
        def setting(name: str) -> Any:
            return getattr(params, name) if params.HasField(name) else getattr(defaults, name, None)

        temperature = params.temperature if params.HasField("temperature") else _temperature(defaults)
        chosen = {name: setting(name) for name in ("top_k", *_FLOATS)}
        for name, value in {"temperature": temperature, **chosen}.items():
            if value is not None and not math.isfinite(value):
                raise InvalidArgument(f"sampling.{name} is {value}; send a finite number")
        if temperature < 0:
            raise InvalidArgument(f"sampling.temperature is {temperature}; send 0 for greedy sampling, or more")
        penalty = chosen["repetition_penalty"]
        least = float(np.float32(MIN_REPETITION_PENALTY))  # as the message holds it
        if penalty is not None and not least <= penalty <= MAX_REPETITION_PENALTY:
            raise InvalidArgument(
                f"sampling.repetition_penalty is {penalty:g}; send a number from {MIN_REPETITION_PENALTY:g} to "
                f"{MAX_REPETITION_PENALTY:g}"
            )
        self.greedy = temperature < MIN_TEMPERATURE or chosen["top_p"] == 0
        self._processors = LogitsProcessorList()
        try:
            self._add_penalties(params, chosen, prompt_tokens)
            if min_new_tokens and ends:
                self._processors.append(
                    MinNewTokensLengthLogitsProcessor(prompt_tokens, min_new_tokens, sorted(ends), device=str(device))
                )
            self._needs_history = len(self._processors) > 0
            if mask is not None:
                self._processors.append(mask)
            if not self.greedy:
                self._add_warpers(temperature, chosen["top_k"], chosen["top_p"], chosen["min_p"])
        except ValueError as error:
            raise InvalidArgument(f"sampling parameters are out of range: {error}") from error
        self._seed = params.seed if params.HasField("seed") else secrets.randbits(64)
        self._choice = choice
        self._generator = torch.Generator(device)

    def _add_penalties(self, params: common_pb2.SamplingParams, chosen: dict[str, Any], prompt_tokens: int) -> None:
        if chosen["repetition_penalty"] is not None and chosen["repetition_penalty"] != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(chosen["repetition_penalty"])))
        if chosen["frequency_penalty"] or chosen["presence_penalty"]:
            frequency, presence = chosen["frequency_penalty"] or 0.0, chosen["presence_penalty"] or 0.0
            self._processors.append(CountPenalty(frequency, presence, prompt_tokens))
        if params.logit_bias:
            bias = {(token,): float(value) for token, value in params.logit_bias.items()}
            self._processors.append(SequenceBiasLogitsProcessor(bias))

    def _add_warpers(self, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
        if temperature != 1:
            self._processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._processors.append(TopKLogitsWarper(int(top_k)))
        if top_p is not None and top_p < 1:
            self._processors.append(TopPLogitsWarper(float(top_p)))
        if min_p:
            self._processors.append(MinPLogitsWarper(float(min_p)))

    def sample(self, logits: torch.Tensor, tokens: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: float [vocabulary], of the last position.
            tokens: all tokens so far, prompt included.
        Raises:
            RuntimeError: the logits are not finite.
        """
        history = torch.tensor([tokens if self._needs_history else ()], dtype=torch.long, device=logits.device)
        scores = self._processors(history, logits[None].float())[0]
        if self.greedy:
            best = scores.argmax(-1)
            # NaN wins argmax, so checking the winner is enough.
            if not bool(torch.isfinite(scores[best])):
                raise RuntimeError("the model's logits are not finite")
            return int(best)
        # The exponential race that torch.multinomial uses, several times faster. Unlike a search in the cumulative
        # sum it samples the same token when rounding changes all probabilities a little.
        self._generator.manual_seed(_hash(self._seed, self._choice, len(tokens)))
        uniform = torch.rand(scores.shape, generator=self._generator, device=logits.device)
        rate = scores.softmax(-1) / uniform.log_().neg_()
        winner = rate.argmax(-1)
        if not bool(torch.isfinite(rate[winner])):
            raise RuntimeError("the model's logits are not finite")
        return int(winner)


class CountPenalty(LogitsProcessor):
    """Frequency and presence penalties over the generated tokens, as OpenAI's API defines them.

    Args:
        prompt_tokens: tokens before the generated ones.
    """

    def __init__(self, frequency: float, presence: float, prompt_tokens: int) -> None:
        self._frequency, self._presence, self._prompt_tokens = frequency, presence, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: int64 [1, tokens so far]. scores: float [1, vocabulary]; returns new ones."""
        tokens, counts = input_ids[0, self._prompt_tokens :].unique(return_counts=True)
        scores = scores.clone()
        scores[0, tokens] -= self._frequency * counts + self._presence
        return scores


def model_defaults(config: Any) -> common_pb2.SamplingParams:
    """What unset parameters are, by the model's generation config."""
    found = {name: getattr(config, name, None) for name in ("top_k", *_FLOATS)}
    given = {name: value for name, value in found.items() if value is not None}
    return common_pb2.SamplingParams(temperature=_temperature(config), **given)


def _temperature(config: Any) -> float:
    """The default temperature: 0, greedy, if the model's generation config does not sample."""
    return float(config.temperature or 1.0) if config.do_sample else 0.0


def _hash(*numbers: int) -> int:
    """A 64-bit hash of numbers, by splitmix64: close numbers give unrelated hashes."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state
