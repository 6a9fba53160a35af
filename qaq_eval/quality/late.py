"""What is asked late: several needles of one text, and formats that were set at its beginning.

Needles: sentences with the codes of several doors are hidden at even depths, and asked for one after the other in a
random order.

Formats: the text begins with an instruction and a few examples of it, with keys and a tag that occur nowhere else.
Then comes ordinary text, and after every part of it the model is asked to go on in the format: a record in JSON with
the two keys, or a reply that ends with the tag. It can only do so by looking back to the beginning.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.quality.documents import bos_tokens
from qaq_eval.quality.needle import MAX_BOUNDARY_DISTANCE, boundary
from qaq_eval.quality.probes import Probe, Session

DOORS = ("red", "green", "blue", "black", "white", "brown", "yellow", "orange")
NEEDLE = "\n\nThe secret code of the {door} door is {code}. Remember it: the {door} door has the code {code}.\n\n"
QUESTION = "\n\nWhat is the secret code of the {door} door? The secret code of the {door} door is"
NEEDLE_TOKENS = 12
"""A code of 7 digits is at most 7 tokens and a space."""

RECORDS = (("Anna", 31), ("Boris", 45), ("Clara", 28), ("David", 52), ("Emma", 37), ("Felix", 63), ("Greta", 41))
REPLIES = (
    "The train arrives at noon.",
    "The museum is closed today.",
    "The soup needs more salt.",
    "The bridge was built of stone.",
    "The river is wide here.",
    "The garden has many roses.",
    "The winter was very cold.",
)
HEAD = (
    'Instructions: every record is JSON with exactly the keys "{first}" and "{second}". Every reply ends with the tag '
    "[{tag}]. Keep to both until the end.\n\n"
)
EXAMPLES = 3
FORMAT_TOKENS = 32
"""Room for a record of two keys whose names are several tokens each."""

_SYLLABLES = ("ba", "do", "ke", "lu", "mi", "no", "pa", "ri", "su", "te", "vo", "za")


def needle_sessions(
    text: str, tokenizer: Any, context: int, needles: int, trials: int, offset_fraction: float = 0.0, seed: int = 0
) -> list[Session]:
    """A session for each trial; prompt, questions and answers take `context` tokens.

    Raises:
        ConfigError: the text or the context is too short, or there are too many needles.
    """
    if not 1 <= needles <= len(DOORS):
        raise ConfigError(f"there can be 1 to {len(DOORS)} needles at once, not {needles}")
    rng, sessions = random.Random(seed), []
    words = _Text(text, tokenizer, offset_fraction)
    for trial in range(trials):
        doors = rng.sample(DOORS, needles)
        codes = [f"{rng.randrange(10**6, 10**7)}" for _ in doors]
        hidden = [words.encode(NEEDLE.format(door=door, code=code)) for door, code in zip(doors, codes, strict=True)]
        probes = [
            Probe(f"{door} door", torch.tensor(words.encode(QUESTION.format(door=door))), (code,), NEEDLE_TOKENS)
            for door, code in zip(doors, codes, strict=True)
        ]
        asked = sum(len(probe.ids) + probe.tokens for probe in probes)
        room = context - len(words.begin) - sum(map(len, hidden)) - asked
        if room < 2 * needles * MAX_BOUNDARY_DISTANCE:
            raise ConfigError(f"a context of {context} tokens is too short for {needles} needles: take a longer one")
        hay = words.take(room)
        ids, at = list(words.begin), 0
        for i, needle in enumerate(hidden):
            split = boundary(hay, room * (i + 1) // (needles + 1), tokenizer)
            ids += [*hay[at:split], *needle]
            at = split
        rng.shuffle(probes)
        sessions.append(Session(trial, torch.tensor([*ids, *hay[at:]]), tuple(probes)))
    return sessions


def format_sessions(
    text: str, tokenizer: Any, context: int, parts: int, trials: int, offset_fraction: float = 0.0, seed: int = 0
) -> list[Session]:
    """A session for each trial: the formats, then `parts` parts of text with a record and a reply after each.

    Instructions, text, questions and answers take `context` tokens.

    Raises:
        ConfigError: the text or the context is too short, or there are too many parts.
    """
    if not 1 <= parts <= len(RECORDS) - EXAMPLES:
        raise ConfigError(f"a format can be asked for 1 to {len(RECORDS) - EXAMPLES} times, not {parts}")
    rng, sessions = random.Random(seed), []
    words = _Text(text, tokenizer, offset_fraction)
    for trial in range(trials):
        first, second, tag = (_word(rng) for _ in range(3))
        tag = f"{tag}-{rng.randrange(10, 100)}"
        head = HEAD.format(first=first, second=second, tag=tag)
        for (name, age), reply in zip(RECORDS[:EXAMPLES], REPLIES, strict=False):
            head += f'Record of {name}, {age}: {{"{first}": "{name}", "{second}": {age}}}\nReply: {reply} [{tag}]\n\n'
        start = [*words.begin, *words.encode(head)]
        questions: list[tuple[list[int], list[int]]] = []
        for (name, age), reply in zip(RECORDS[EXAMPLES : EXAMPLES + parts], REPLIES[EXAMPLES:], strict=False):
            questions.append((words.encode(f"\n\nRecord of {name}, {age}:"), words.encode(f"\nReply: {reply}")))
        asked = sum(len(record) + len(reply) + 2 * FORMAT_TOKENS for record, reply in questions)
        room = (context - len(start) - asked) // parts
        if room < 2 * MAX_BOUNDARY_DISTANCE:
            raise ConfigError(f"a context of {context} tokens is too short for {parts} parts: take a longer one")
        prompt = [*start, *words.take(room)]
        probes = []
        for i, (record, reply_to) in enumerate(questions):
            more = words.take(room) if i else []
            keys = (f'"{first}"', f'"{second}"')
            probes.append(Probe("keys", torch.tensor([*more, *record]), keys, FORMAT_TOKENS))
            probes.append(Probe("tag", torch.tensor(reply_to), (f"[{tag}]",), FORMAT_TOKENS))
        sessions.append(Session(trial, torch.tensor(prompt), tuple(probes)))
    return sessions


class _Text:
    """The tokens of a text, taken from its beginning on."""

    def __init__(self, text: str, tokenizer: Any, offset_fraction: float) -> None:
        self._encode: Callable[..., Any] = tokenizer
        self.begin = bos_tokens(tokenizer)
        ids = self.encode(text)
        self._rest = ids[int(len(ids) * offset_fraction) :]

    def encode(self, part: str) -> list[int]:
        ids: list[int] = self._encode(part, add_special_tokens=False, verbose=False).input_ids
        return ids

    def take(self, count: int) -> list[int]:
        """The next tokens."""
        if count > len(self._rest):
            raise ConfigError("the text is too short: take a longer text, fewer trials or a shorter context")
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(3))
