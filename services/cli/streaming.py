"""Shows a generation on the terminal, and measures it at the client."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from qaq.v1 import common_pb2, generate_pb2
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.cli.terminal import errors, screen


@dataclass
class Generation:
    """A received generation. Times are in seconds since the request was sent, at the client."""

    text: str = ""
    tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    reason: int = common_pb2.FINISH_REASON_UNSPECIFIED
    usage: common_pb2.Usage = field(default_factory=common_pb2.Usage)

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: the time to the first token is not counted."""
        seconds = self.last_token_s - self.first_token_s
        return (self.tokens - 1) / seconds if seconds > 0 else 0.0


def follow(replies: Iterable[generate_pb2.GenerateReply], *, quiet: bool = False) -> Generation:
    """Shows the progress of prefill, and the text as it arrives. `quiet` shows no text.

    Raises:
        grpc.RpcError: the call failed.
    """
    begun = time.monotonic()
    got = Generation()
    columns = (
        TextColumn("prefill"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        prompt = progress.add_task("prompt", total=None, visible=False)
        for reply in replies:
            match reply.WhichOneof("event"):
                case "prefill":
                    done, total = reply.prefill.tokens_done, reply.prefill.tokens_total
                    progress.update(prompt, completed=done, total=total, visible=True)
                    continue
                case "token":
                    now = time.monotonic() - begun
                    got.first_token_s = got.first_token_s or now
                    got.last_token_s, got.tokens = now, got.tokens + 1
                    got.token_ids.append(reply.token.token_id)
                    text = reply.token.text
                case _:
                    got.reason, got.usage = reply.finished.reason, reply.finished.usage
                    text = reply.finished.text
            if progress.live.is_started:
                progress.stop()
            got.text += text
            if not quiet:
                screen.out(text, end="", highlight=False)
    if not quiet:
        screen.out()
    return got
