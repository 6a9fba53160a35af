"""A served model: its workers, its queue, its tokenizer and its limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container, Sequence

import structlog
from qaq.v1 import common_pb2, generate_pb2

from services.common import metrics
from services.common.admission import Admission
from services.common.errors import Unavailable
from services.common.limits import MAX_CHOICES
from services.common.log import once
from services.common.settings import RouterSettings
from services.common.tasks import ended
from services.router import placement
from services.router.prompts import Prompts
from services.router.session import Session
from services.router.validation import Limits
from services.router.workers import WorkerLink, Workers

RETRY_AFTER_MS = 2000
LOAD_AGAIN_S = 30.0
"""After so long a tokenizer that could not be loaded is tried again: its files may have been put there."""

log = structlog.get_logger()


class Model:
    """A model that workers serve, or served. Nothing of it waits for another model.

    Args:
        info: as its workers describe it; also an attribute, which is that of those who describe it now, or did last.
        tokenizer: where it is loaded from; the loading begins.
        prompts: loaded already.

    Attributes:
        links: the workers that can run its generations.
        removed: its workers finish what was accepted, and nothing new is.
        admission: its queue.
    """

    def __init__(
        self,
        info: common_pb2.ModelInfo,
        settings: RouterSettings,
        workers: Workers,
        tokenizer: str,
        prompts: Prompts | None = None,
    ) -> None:
        self.info, self.removed = info, False
        self.links: list[WorkerLink] = []
        self._settings, self._workers = settings, workers
        self._policies = placement.make(settings.placement)
        self.admission = Admission(
            settings.max_queue, lambda: self.capacity, depth=metrics.queue_depth, waited=metrics.queue_seconds
        )
        self._tokenizer, self._prompts, self._problem = tokenizer, prompts, ""
        self._began = self._seen = time.monotonic()
        self._loading = asyncio.create_task(self._load(), name=f"tokenizer {self.name}")

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def capacity(self) -> int:
        """Sequences that the ready workers can decode at once."""
        return sum(link.facts.max_sequences for link in self.links if link.facts)

    @property
    def max_choices(self) -> int:
        """The most choices of one prompt that a ready worker can decode."""
        most = max((link.facts.max_sequences for link in self.links if link.facts), default=MAX_CHOICES)
        return min(most, MAX_CHOICES)

    @property
    def limits(self) -> Limits:
        sizes = self._settings.max_prompt_bytes, self.info.context_length, self.info.vocab_size
        return Limits(*sizes, self.max_choices)

    @property
    def leaving(self) -> bool:
        """Whether this router stops."""
        return self._workers.leaving

    @property
    def absent_s(self) -> float:
        """Seconds for which it has had no worker."""
        return 0.0 if self.links else time.monotonic() - self._seen

    def is_named(self, name: str) -> bool:
        return name in (self.info.name, self.info.source)

    def update(self, links: Sequence[WorkerLink]) -> None:
        """Takes over what the workers said last. Those who wait may begin."""
        self.links = list(links)
        if links:
            assert links[0].facts is not None  # it is ready
            self.info, self._seen = links[0].facts.model, time.monotonic()
            self.removed = all(link.retiring for link in links)
            weights = {link.facts.model.fingerprint for link in links if link.facts}
            if len(weights) > 1 and once(f"weights of {self.name}"):
                log.warning("workers of one model's name have different weights", model=self.name)
        failed = self._prompts is None and self._loading.done()
        if failed and links and time.monotonic() - self._began >= LOAD_AGAIN_S:
            self._began = time.monotonic()
            self._loading = asyncio.create_task(self._load(), name=f"tokenizer {self.name}")
        self.admission.wake()

    def place(self, session: Session, prompt: Sequence[int], refused: Container[str]) -> WorkerLink | None:
        """The worker for a generation, except those that refused it. None if there is no other."""
        left = [link for link in self.links if link.address not in refused]
        return placement.place(session, prompt, left, self._policies)

    async def prompts(self) -> Prompts:
        """Makes its prompts. Waits while the tokenizer is loaded.

        Raises:
            Unavailable: it cannot be loaded.
        """
        if self._prompts is None:
            await asyncio.wait({self._loading})  # which a caller that goes away does not stop
        if self._prompts is None:
            raise Unavailable(self._problem, retry_after_ms=RETRY_AFTER_MS)
        return self._prompts

    def described(self, *, is_default: bool) -> generate_pb2.GetModelReply:
        return generate_pb2.GetModelReply(
            model=self.info,
            workers=len(self.links),
            max_choices=self.max_choices,
            is_default=is_default,
            waiting=self.admission.waiting,
            unavailable=self._problem,
        )

    def no_worker(self) -> Unavailable:
        """The error of a generation that no worker takes."""
        if self.removed:
            return Unavailable(f'the model "{self.name}" was removed, and its workers have ended; use another model')
        return no_worker(self.name)

    async def close(self) -> None:
        await ended(self._loading)

    async def _load(self) -> None:
        if self._prompts is not None:
            return
        try:
            self._prompts = await Prompts.load(self._tokenizer)
            self._problem = ""
        except Exception as error:  # whatever it is: the other models are served
            self._problem = (
                f'the model "{self.name}" cannot be used here, because the router cannot load its tokenizer: {error}'
            )
            log.error("a tokenizer cannot be loaded", model=self.name, tokenizer=self._tokenizer, error=str(error))


def no_worker(name: str = "", instead: str = "") -> Unavailable:
    of, also = f' of "{name}"' if name else "", f"; or {instead}" if instead else ""
    return Unavailable(
        f"no worker{of} is ready; one may still be loading its model: try again, or start one with `qaq worker`, or in "
        f"a stack of `qaq up` with `qaq scale`{also}",
        retry_after_ms=RETRY_AFTER_MS,
    )
