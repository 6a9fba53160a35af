"""Checks what a worker is asked, and makes a generation of it."""

from __future__ import annotations

from qaq.v1 import worker_pb2

from qaq_core.loading import LoadedModel
from qaq_core.shape import ModelShape
from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.settings import WorkerSettings
from services.worker.generation import Generation
from services.worker.sampling import Sampler
from services.worker.text import TextStream, backend_of


class Checker:
    """Knows the limits of one model on this worker.

    Raises:
        UnsupportedModelError: its tokenizer cannot decode as it goes.
    """

    def __init__(self, loaded: LoadedModel, settings: WorkerSettings) -> None:
        self._loaded, self._settings = loaded, settings
        self._backend = backend_of(loaded.tokenizer)
        self._vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        self._device = next(loaded.model.parameters()).device
        shape = ModelShape.of(loaded.model)
        self._token_bytes = shape.layers * 2 * shape.kv_heads * shape.head_dim * loaded.dtype.itemsize

    def prompt_bytes(self, tokens: int) -> int:
        """Bytes of a prompt's keys and values while it is computed, in full precision."""
        return tokens * self._token_bytes

    def generation(self, request: worker_pb2.RunRequest) -> Generation:
        """Raises:
        InvalidArgument: says which field to change and to what.
        ResourceExhausted: the prompt alone is more than the worker's budget.
        """
        tokens, context = request.token_ids, self._loaded.context_length
        if not tokens:
            raise InvalidArgument("token_ids is empty; send at least one token")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary:
            raise InvalidArgument(f"token_ids must be from 0 to {self._vocabulary - 1}, the model's vocabulary")
        if len(tokens) >= context:
            raise InvalidArgument(
                f"token_ids has {len(tokens)} tokens and the model's context of {context} has room for "
                f"{context - 1}; shorten the prompt"
            )
        if request.stop.max_new_tokens < 1:
            raise InvalidArgument(f"stop.max_new_tokens is {request.stop.max_new_tokens}; send at least 1")
        if not all(request.stop.stop):
            raise InvalidArgument("stop.stop holds an empty string; leave it out")
        budget = self._settings.kv_budget_bytes
        if budget is not None and self.prompt_bytes(len(tokens)) > budget:
            raise ResourceExhausted(
                f"a prompt of {len(tokens)} tokens takes {self.prompt_bytes(len(tokens)):,} bytes while it is "
                f"computed and this worker has {budget:,}; shorten it, or raise QAQ_KV_BUDGET_BYTES"
            )
        sampler = Sampler(request.sampling, self._loaded.model.generation_config, self._device)
        text = TextStream(self._backend, tokens, request.stop.stop)
        return Generation(request, sampler, text, self._loaded.eos_token_ids, context)
