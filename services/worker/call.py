"""A call of `Worker.Run`: where its messages go, and whether somebody still wants them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from qaq.v1 import worker_pb2

Reply = worker_pb2.RunReply


@dataclass
class Call:
    """The call of a request, shared by all its choices.

    Attributes:
        replies: messages for the caller, at most one per token and two per chunk. The last one of each choice is
            a Finished; an error ends the call.
        cancelled: nobody wants the generation any more.
        left: nobody reads the messages now. Nothing is decoded until another call takes the generation over.
    """

    replies: asyncio.Queue[Reply | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    left: bool = False
