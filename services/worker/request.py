"""Validation of requests to a worker."""

from __future__ import annotations

from qaq.v1 import worker_pb2

from qaq_core.models import LoadedModel
from services.common import parameters, precision
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

    def check(self, request: worker_pb2.RunRequest) -> None:
        """Checks everything but the constraint.

        Raises:
            InvalidArgument: names the field to change and its limits.
        """
        tokens, context = request.token_ids, self._loaded.context_length
        if not tokens:
            raise InvalidArgument("token_ids is empty; send at least one token")
        parameters.check(request, context, self.vocabulary)
        room = context if parameters.scored_only(request.stop) else context - 1
        if len(tokens) > room:
            raise InvalidArgument(
                f"token_ids has {len(tokens)} tokens and the model's context of {context} has room for "
                f"{room}; shorten the prompt"
            )
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise InvalidArgument(f"token_ids must be from 0 to {self.vocabulary - 1}, the model's vocabulary")
        self._check_choices(request)
        precision.floor(request.lambda_floor)
        for name, count in (("history_tokens", request.history_tokens), ("generated_tokens", request.generated_tokens)):
            if not 0 <= count < len(tokens):
                raise InvalidArgument(f"{name} is {count}; send 0 to {len(tokens) - 1}, with {len(tokens)} token_ids")

    def generation(self, request: worker_pb2.RunRequest, grammar: Grammar | None = None) -> Generation:
        """The generation of a request.

        Args:
            grammar: of the request's constraint.
        Raises:
            InvalidArgument: as `check`.
        """
        self.check(request)
        decoders = [self._decoder(request, choice, grammar) for choice in range(max(1, request.choices))]
        logprobs = Logprobs(request.output, self._tokens)
        return Generation(request, decoders, logprobs, self._loaded.eos_token_ids, self._loaded.context_length)

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

    def _check_choices(self, request: worker_pb2.RunRequest) -> None:
        if not 0 <= request.choices <= self._settings.max_sequences:
            raise InvalidArgument(
                f"choices is {request.choices}, and this worker decodes at most {self._settings.max_sequences} "
                "sequences at a time; send fewer"
            )
        if request.choices > 1 and (request.keep or request.generated_tokens):
            raise InvalidArgument("a session that is kept continues with one choice; send choices 1")
