"""The tokens of an echoed prompt when a generation begins again, on another worker or through another router."""

from __future__ import annotations

from qaq.v1 import common_pb2


class EchoOnce:
    """Lets every token of an echoed prompt pass once, though a stream that begins again sends them from the first on.

    `restart` is to be called before each stream.
    """

    def __init__(self) -> None:
        self._passed = self._at = 0

    def restart(self) -> None:
        self._at = 0

    def fresh(self, message: common_pb2.PromptTokens) -> common_pb2.PromptTokens | None:
        """The tokens of a message that have not passed; None if all have."""
        known = max(0, self._passed - self._at)
        self._at += len(message.tokens)
        self._passed = max(self._passed, self._at)
        if known == 0:
            return message
        tokens = message.tokens[known:]
        return common_pb2.PromptTokens(tokens=tokens) if tokens else None
