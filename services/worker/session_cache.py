"""The session cache: sessions between two turns. Their pages give way to those of running ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from services.worker.session import Session


class SessionCache:
    """At most `capacity` idle sessions by id. The least recently used one is evicted first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def put(self, session_id: str, session: Session) -> None:
        """Adds a session, in place of one with the same id."""
        self.drop(session_id)
        session.rest()
        self._sessions[session_id] = session
        while len(self._sessions) > self._capacity:
            self.evict()

    def peek(self, session_id: str) -> Session | None:
        """The session, which stays here; None if there is none."""
        return self._sessions.get(session_id)

    def take(self, session_id: str) -> Session | None:
        """Removes and returns the session; None if there is none."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.wake()
        return session

    def drop(self, session_id: str) -> bool:
        """Frees a session; False if there is none."""
        session = self._sessions.pop(session_id, None)
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
