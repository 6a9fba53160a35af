"""Validation of requests to a worker."""

from __future__ import annotations

import math

from qaq.v1 import worker_pb2

from qaq_core.models import LoadedModel
from services.common.errors import InvalidArgument
from services.common.settings import WorkerSettings
from services.worker.constraints import Grammar, GrammarMask
from services.worker.generation import ChoiceDecoder, Generation
from services.worker.logprobs import Logprobs
from services.worker.sampling import Sampler
from services.worker.text import TextStream, tokenizer_backend
from services.worker.vocabulary import Vocabulary


class RequestValidator:
    """Checks requests against the limits of the model and of the worker.

    Attributes:
        vocabulary: number of token ids.

    Raises:
        UnsupportedModelError: the tokenizer cannot decode incrementally.
    """

    def __init__(self, loaded: LoadedModel, settings: WorkerSettings) -> None:
        self._loaded, self._settings = loaded, settings
        self._backend = tokenizer_backend(loaded.tokenizer)
        self._tokens = Vocabulary(self._backend)
        self.vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        self._device = next(loaded.model.parameters()).device

    def generation(self, request: worker_pb2.RunRequest, grammar: Grammar | None = None) -> Generation:
        """The generation of a request.

        Args:
            grammar: of the request's constraint.
        Raises:
            InvalidArgument: names the field to change and its limits.
        """
        tokens, bias, context = request.token_ids, request.sampling.logit_bias, self._loaded.context_length
        if not tokens:
            raise InvalidArgument("token_ids is empty; send at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise InvalidArgument(f"token_ids must be from 0 to {self.vocabulary - 1}, the model's vocabulary")
        scored_only = self._check_length(request)
        room = context if scored_only else context - 1
        if len(tokens) > room:
            raise InvalidArgument(
                f"token_ids has {len(tokens)} tokens and the model's context of {context} has room for "
                f"{room}; shorten the prompt"
            )
        if not all(request.stop.stop):
            raise InvalidArgument("stop.stop has an empty string; remove it")
        self._check_choices(request)
        if grammar is not None and request.stop.ignore_eos:
            raise InvalidArgument("a text with a constraint ends where the constraint says; leave ignore_eos unset")
        for name, count in (("history_tokens", request.history_tokens), ("generated_tokens", request.generated_tokens)):
            if not 0 <= count < len(tokens):
                raise InvalidArgument(f"{name} is {count}; send 0 to {len(tokens) - 1}, with {len(tokens)} token_ids")
        for name, ids in (("stop.stop_token_ids", request.stop.stop_token_ids), ("sampling.logit_bias", bias)):
            if ids and (min(ids) < 0 or max(ids) >= self.vocabulary):
                raise InvalidArgument(f"{name} must have token ids from 0 to {self.vocabulary - 1}")
        wrong = next((token for token, value in bias.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise InvalidArgument(f"sampling.logit_bias[{wrong}] is {bias[wrong]}; send a finite number")
        decoders = [self._decoder(request, choice, grammar) for choice in range(max(1, request.choices))]
        logprobs = Logprobs(request.output, self._tokens)
        return Generation(request, decoders, logprobs, self._loaded.eos_token_ids, context)

    def _decoder(self, request: worker_pb2.RunRequest, choice: int, grammar: Grammar | None) -> ChoiceDecoder:
        """How a choice of a valid request is decoded."""
        stop, eos = request.stop, self._loaded.eos_token_ids
        prompt = request.token_ids[: len(request.token_ids) - request.generated_tokens]
        mask = None if grammar is None else GrammarMask(grammar, eos, self.vocabulary)
        sampler = Sampler(
            request.sampling,
            self._loaded.model.generation_config,
            self._device,
            choice,
            len(prompt),
            stop.min_new_tokens,
            {*stop.stop_token_ids, *(() if stop.ignore_eos else eos)},
            mask,
        )
        text = TextStream(
            self._backend,
            prompt,
            stop.stop,
            include_stop=stop.include_stop_string,
            special_tokens=request.output.special_tokens,
        )
        return ChoiceDecoder(sampler, text, mask)

    def _check_length(self, request: worker_pb2.RunRequest) -> bool:
        """Checks how many tokens are to be generated; returns whether none is."""
        stop, output = request.stop, request.output
        none = stop.HasField("max_new_tokens") and stop.max_new_tokens == 0
        if stop.max_new_tokens < 0:
            raise InvalidArgument(f"stop.max_new_tokens is {stop.max_new_tokens}; send at least 0")
        if none and not (output.echo or output.HasField("prompt_logprobs")):
            raise InvalidArgument("stop.max_new_tokens is 0; send at least 1, or set output.echo")
        if stop.min_new_tokens < 0 or (stop.HasField("max_new_tokens") and stop.min_new_tokens > stop.max_new_tokens):
            raise InvalidArgument(f"stop.min_new_tokens is {stop.min_new_tokens}; send 0 to stop.max_new_tokens")
        return none

    def _check_choices(self, request: worker_pb2.RunRequest) -> None:
        if not 0 <= request.choices <= self._settings.max_sequences:
            raise InvalidArgument(
                f"choices is {request.choices}, and this worker decodes at most {self._settings.max_sequences} "
                "sequences at a time; send fewer"
            )
        if request.choices > 1 and (request.keep or request.generated_tokens):
            raise InvalidArgument("a session that is kept continues with one choice; send choices 1")
        for name in ("top_logprobs", "prompt_logprobs"):
            if not 0 <= getattr(request.output, name) <= self.vocabulary:
                raise InvalidArgument(f"output.{name} is {getattr(request.output, name)}; send at least 0")
