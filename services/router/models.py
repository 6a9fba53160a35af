"""The models that this router serves: those of the workers that are registered, by name."""

from __future__ import annotations

from collections import defaultdict

import structlog
from qaq.v1 import generate_pb2

from qaq_core.models import name_of
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.settings import RouterSettings
from services.router.model import Model, no_worker
from services.router.prompts import Prompts
from services.router.session import Session
from services.router.validation import MODEL_NOT_FOUND
from services.router.workers import WorkerLink, Workers

FORGET_S = 600.0
"""A model that has had no worker for so long is not served any more."""

log = structlog.get_logger()


class Models:
    """Follows the workers. A model appears with its first worker; one that was removed goes with its last.

    Args:
        prompts: of the model that the setting `model` names; None without it.
    """

    def __init__(self, settings: RouterSettings, workers: Workers, prompts: Prompts | None) -> None:
        self._settings, self._workers, self._prompts = settings, workers, prompts
        self._named = settings.model or ""
        self._default_name = name_of(self._named) if self._named else ""
        self._models: dict[str, Model] = {}  # by name, in the order in which they appeared
        workers.refreshed = self.update

    @property
    def default(self) -> Model | None:
        """The model of requests that name none: that of the setting `model`, else the first. None while it is not
        there."""
        return next((model for model in self._models.values() if not self._named or self._is_named(model)), None)

    @property
    def waiting(self) -> int:
        """Generations in all queues."""
        return sum(model.admission.waiting for model in self._models.values())

    @property
    def queued(self) -> dict[str, int]:
        """The same by model."""
        return {model.name: model.admission.waiting for model in self._models.values()}

    def list(self) -> list[Model]:
        """All models, the default first.

        Raises:
            Unavailable: there has been no worker yet.
        """
        if not self._models:
            raise no_worker()
        default = self.default
        return sorted(self._models.values(), key=lambda model: (model is not default, model.name))

    def get(self, name: str = "") -> Model:
        """The model that a request names.

        Raises:
            NotFound: it is not served.
            Unavailable: there has been no worker of it yet.
        """
        model = self.find(name)
        if model is None:
            raise self._missing(name)
        if model.removed:
            raise NotFound(f'the model "{model.name}" is being removed; {self._others()}', reason=MODEL_NOT_FOUND)
        return model

    def find(self, name: str = "") -> Model | None:
        """As `get`; None if that raises for want of the model."""
        if not name:
            return self.default
        return self._models.get(name) or next((each for each in self._models.values() if each.is_named(name)), None)

    def of(self, session: Session, name: str = "") -> Model:
        """The model of a session, which a request may name too.

        Raises:
            NotFound: the request names one that is not served.
            InvalidArgument: it names another one.
            FailedPrecondition: the session's model is not served.
            Unavailable: there has been no worker yet.
        """
        if not self._models:
            raise no_worker()
        if name and self.get(name).name != session.model:
            raise InvalidArgument(
                f'session "{session.id}" is of the model "{session.model}"; send that name, or leave model empty'
            )
        model = self._models.get(session.model)
        if model is None or model.removed:
            raise FailedPrecondition(
                f'session "{session.id}" has ended: its model "{session.model[:100]}" is not served any more; open '
                f"another session, and {self._others()}"
            )
        return model

    def described(self, model: Model) -> generate_pb2.GetModelReply:
        return model.described(is_default=model is self.default)

    def update(self) -> None:
        """Takes over which workers there are."""
        found: defaultdict[str, list[WorkerLink]] = defaultdict(list)
        for link in self._workers.ready:
            assert link.facts is not None  # it is ready
            found[link.facts.model.name].append(link)
        for name in sorted(found.keys() - self._models.keys()):
            self._models[name] = self._new(found[name][0])
        for name, model in list(self._models.items()):
            model.update(found[name])
            if not model.links and (model.removed or model.absent_s > FORGET_S):
                del self._models[name]
                log.info("a model is not served any more", model=name)

    async def close(self) -> None:
        for model in self._models.values():
            await model.close()

    def _new(self, link: WorkerLink) -> Model:
        assert link.facts is not None
        info = link.facts.model
        log.info("a model is served", model=info.name, source=info.source)
        if self._is_default(info.name, info.source):
            return Model(info, self._settings, self._workers, self._named, self._prompts)
        return Model(info, self._settings, self._workers, info.source)

    def _is_named(self, model: Model) -> bool:
        return self._is_default(model.info.name, model.info.source)

    def _is_default(self, name: str, source: str) -> bool:
        """Whether a model is that of the setting `model`."""
        return bool(self._named) and (self._named == source or _same(self._default_name, name))

    def _missing(self, name: str) -> Exception:
        if not self._models:
            return no_worker()
        if not name or name in (self._named, self._default_name):
            return no_worker(self._default_name, self._others())
        return NotFound(f'model "{name[:100]}" is not served here; {self._others()}', reason=MODEL_NOT_FOUND)

    def _others(self) -> str:
        """What to use."""
        names = [f'"{model.name}"' for model in self._models.values() if not model.removed]
        if not names:
            return "no other is served here"
        has_default = self.default is not None and not self.default.removed
        return f"use {' or '.join(names)}" + (" or leave model empty" if has_default else "")


def _same(one: str, other: str) -> bool:
    """Whether two names are of one model: equal, or that of a directory and the hub's, which has its owner before."""
    if ("/" in one) == ("/" in other):
        return one == other
    return one.rpartition("/")[2] == other.rpartition("/")[2]
