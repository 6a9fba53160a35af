"""The requests of a load test: a random mix, or a trace from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qaq_core.base.errors import ConfigError

SHARED_TOKENS = 256
_DECK = ("conversation", "short", "short", "long")


class Arrival(BaseModel):
    """One request; in a trace, one line.

    Attributes:
        at: seconds after the start at which it is sent, or later if the session's previous turn has not ended.
        prompt, prompt_tokens: the text of the prompt, or the length of a generated one.
        new_tokens: tokens to generate.
        session: requests with the same name are turns of one session; empty for a single request.
        shared: requests (first turns of sessions) with the same name begin with the same `shared_tokens` tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: float = Field(default=0.0, ge=0)
    prompt: str = ""
    prompt_tokens: int = Field(default=0, ge=0)
    new_tokens: int = Field(ge=1)
    session: str = ""
    shared: str = ""
    shared_tokens: int = Field(default=SHARED_TOKENS, ge=0)

    @model_validator(mode="after")
    def _one_prompt(self) -> Arrival:
        if bool(self.prompt) == bool(self.prompt_tokens):
            raise ValueError("give either prompt or prompt_tokens")
        return self


Script = Sequence[Arrival]
"""Consecutive requests: the turns of a session, or a single request."""


def mix(requests: int, seed: int) -> list[Script]:
    """A mix of conversations under two system prompts, short questions, and long documents.

    Of six requests, three are the turns of a conversation, two are short and one is long.
    """
    rng = random.Random(seed)
    scripts: list[Script] = []
    left, deck = requests, list[str]()
    while left:
        deck = deck or rng.sample(_DECK, len(_DECK))
        kind = deck.pop()
        if kind == "conversation":
            name, shared = f"s{len(scripts)}", f"system-{rng.randrange(2)}"
            turns = [
                Arrival(
                    prompt_tokens=rng.randint(16, 64),
                    new_tokens=rng.randint(16, 48),
                    session=name,
                    shared="" if turn else shared,
                )
                for turn in range(min(left, 3))
            ]
            scripts.append(turns)
        elif kind == "short":
            scripts.append([Arrival(prompt_tokens=rng.randint(16, 128), new_tokens=rng.randint(16, 64))])
        else:
            scripts.append([Arrival(prompt_tokens=rng.randint(512, 1024), new_tokens=rng.randint(16, 32))])
        left -= len(scripts[-1])
    return scripts


def read_trace(path: Path) -> list[Script]:
    """Requests from a JSONL file, one `Arrival` per line, in the order of `at`.

    Raises:
        ConfigError: the message says which line is wrong, and why.
    """
    arrivals = sorted(_lines(path), key=lambda arrival: arrival.at)
    if not arrivals:
        raise ConfigError(f"{path} has no requests; each line is one, as JSON")
    scripts: dict[str, list[Arrival]] = {}
    for place, arrival in enumerate(arrivals):
        scripts.setdefault((arrival.session and f"session {arrival.session}") or str(place), []).append(arrival)
    return list(scripts.values())


def _lines(path: Path) -> Iterator[Arrival]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield Arrival.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error.msg})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{path}, line {number}: {where + ': ' if where else ''}{first['msg']}") from error
