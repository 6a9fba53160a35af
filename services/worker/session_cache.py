"""The session cache: sessions between two turns. Their pages give way to those of running ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from qaq.v1 import worker_pb2

from services.worker.session import Session

Name = tuple[str, str]
"""The tenant of a session, and its id. A session is found by both: no tenant continues another one's."""


def session_name(request: worker_pb2.RunRequest) -> Name:
    """The session that a request names; its id may be empty."""
    return request.tenant, request.session_id


class SessionCache:
    """At most `capacity` idle sessions by name. The least recently used one is evicted first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sessions: OrderedDict[Name, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def put(self, name: Name, session: Session) -> None:
        """Adds a session, in place of one with the same name."""
        self.drop(name)
        session.rest()
        self._sessions[name] = session
        while len(self._sessions) > self._capacity:
            self.evict()

    def peek(self, name: Name) -> Session | None:
        """The session, which stays here; None if there is none."""
        return self._sessions.get(name)

    def take(self, name: Name) -> Session | None:
        """Removes and returns the session; None if there is none."""
        session = self._sessions.pop(name, None)
        if session is not None:
            session.wake()
        return session

    def drop(self, name: Name) -> bool:
        """Frees a session; False if there is none."""
        session = self._sessions.pop(name, None)
        if session is not None:
            session.close()
        return session is not None

    def evict(self) -> bool:
        """Frees the least recently used session; False if there is none."""
        if not self._sessions:
            return False
        _, session = self._sessions.popitem(last=False)
        session.close()
        return True

    def clear(self) -> None:
        """Frees all sessions."""
        while self.evict():
            pass
