"""The model's forward passes over sessions: parts of prompts, decode steps, drafts."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import torch

from qaq_core import QAQCache
from qaq_core.base.errors import UnsupportedModelError
from qaq_core.models import Decoder, LoadedModel
from services.worker.session import Session

log = structlog.get_logger()


class ForwardPass:
    """Prompts go through transformers' modules, decode steps and drafts through QAQ's decoder if it knows the model.

    Attributes:
        decoder: None if decode steps go through transformers too. The log says which, and why.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, self._device = loaded.model, next(loaded.model.parameters()).device
        self.decoder = _decoder_of(loaded)

    def __call__(
        self, sessions: Sequence[Session], chunks: Sequence[list[int]], keep: int = 1, decodes: bool = False
    ) -> torch.Tensor:
        """Computes a chunk of each session. All chunks have the same length.

        Args:
            decodes: the chunks are tokens of a decode step or a draft, not parts of prompts.
        Returns:
            logits [sessions, keep, vocabulary] of the last `keep` tokens.
        """
        starts = [session.sequence.length for session in sessions]
        places = [list(range(at, at + len(chunk))) for at, chunk in zip(starts, chunks, strict=True)]
        given = torch.tensor([list(chunks), places], pin_memory=self._device.type == "cuda")
        ids, positions = given.to(self._device, non_blocking=True)
        cache = QAQCache([session.sequence for session in sessions])
        cache.place(given[1])
        # Who hooks the model's forward passes is to see them all.
        hooked = self._model._forward_pre_hooks or self._model._forward_hooks
        if decodes and self.decoder is not None and not hooked:
            return self.decoder(ids, positions, cache, keep)
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            qaq_cache=cache,
        )
        logits: torch.Tensor = output.logits
        return logits


def _decoder_of(loaded: LoadedModel) -> Decoder | None:
    try:
        decoder = Decoder(loaded.model)
    except UnsupportedModelError as error:
        log.info("decode steps go through transformers", model=loaded.name, reason=str(error))
        return None
    log.info("decode steps go through QAQ's decoder", model=loaded.name, pieces=decoder.name)
    return decoder
