"""Sessions between two turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from services.worker.session import Session


class SessionCache:
    """Keeps at most `most` idle sessions; the one that was not used for longest goes first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    def put(self, session_id: str, session: Session) -> None:
        self.drop(session_id)
        self._sessions[session_id] = session
        while len(self._sessions) > self._most:
            self.evict()

    def look(self, session_id: str) -> Session | None:
        """The session, which stays on the shelf."""
        return self._sessions.get(session_id)

    def take(self, session_id: str) -> Session | None:
        """The session, no longer on the shelf; None if it is not there."""
        return self._sessions.pop(session_id, None)

    def drop(self, session_id: str) -> bool:
        """Frees a session; False if it is not there."""
        session = self.take(session_id)
        if session is not None:
            session.close()
        return session is not None

    def evict(self) -> bool:
        """Frees the session that was not used for longest; False if there is none."""
        if not self._sessions:
            return False
        _, session = self._sessions.popitem(last=False)
        session.close()
        return True

    def clear(self) -> None:
        while self.evict():
            pass
