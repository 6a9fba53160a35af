"""Grammars whose texts can be read in too many ways: to follow one takes time that grows with the square of a text.

A rule is such a one if it can stand beside itself, with nothing that must be there in between, as in
`x ::= "a" | x x`; also through other rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_STEPS = 100_000
"""Of the search for such rules, a microsecond each."""

MAX_NESTED = 64

# Of GBNF: what is passed over, literals, classes of characters, names, and signs. What is not closed goes to the end of
# the text, so that all of them together take time in proportion to the text.
_TOKENS = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<rule>[\w.-]+)\s*::=|"(?P<text>(?:[^"\\]|\\.)*)"?|\[(?:\\.|[^\]\\])+\]?"""
    r"""|(?P<name>[\w.-]+)|(?P<open>\()|(?P<close>\))|(?P<or>\|)|(?P<repeat>[*+?]|\{(?P<least>[\s\d]*)[^}]*\}?)""",
    re.DOTALL,
)


Token = tuple[str, str]


@dataclass
class _Part:
    """What is known of a piece of a body.

    Attributes:
        first, last: rules that it may begin and end with.
        beside: pairs of rules that may stand beside each other in it.
        empty: whether an empty text fits it.
    """

    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    beside: set[tuple[str, str]] = field(default_factory=set)
    empty: bool = False


class TooLargeError(ValueError):
    """A grammar is too large, or nested too deeply, to be searched."""


class _Steps:
    def __init__(self) -> None:
        self._left = MAX_STEPS

    def take(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise TooLargeError("it is too large; write fewer rules, or shorter ones")


def beside_itself(grammar: str) -> str | None:
    """The name of a rule of a grammar in GBNF that can stand beside itself; None if there is none. What is no grammar
    has none: the compiler says what is wrong.

    Raises:
        TooLargeError: it cannot be searched.
    """
    bodies, steps = _bodies(grammar), _Steps()
    parts = _parts(bodies, steps)
    begins = _closure({name: part.first for name, part in parts.items()}, steps)
    ends = _closure({name: part.last for name, part in parts.items()}, steps)
    inside = _closure({name: {text for kind, text in body if kind == "name"} for name, body in bodies.items()}, steps)
    recursive = [name for name in parts if any(name in inside.get(other, ()) for other in inside[name] - {name})]
    recursive += [name for name, body in bodies.items() if ("name", name) in body]
    for name in recursive:
        # A text of the rule is then split between two parts, each of which may be a text of the rule.
        for other in inside[name]:
            pairs = parts[other].beside if other in parts and name in inside[other] else ()
            steps.take(len(pairs))
            if any(name in ends.get(left, ()) and name in begins.get(right, ()) for left, right in pairs):
                return name
    return None


def _parts(bodies: dict[str, list[Token]], steps: _Steps) -> dict[str, _Part]:
    """What is known of each rule, once it is known which may be empty."""
    empty: set[str] = set()
    while True:
        known = len(empty)
        parts = {}
        for name, body in bodies.items():
            parts[name] = _Reader(body, empty, steps).alternatives()
            if parts[name].empty:
                empty.add(name)
        if len(empty) == known:
            return parts


def _bodies(grammar: str) -> dict[str, list[Token]]:
    """The tokens of each rule."""
    found: dict[str, list[Token]] = {}
    body: list[Token] = []
    at = 0
    while at < len(grammar):
        match = _TOKENS.match(grammar, at)
        if match is None:
            at += 1
            continue
        at = match.end()
        kind = match.lastgroup or "class"
        if match["rule"] is not None:
            body = found.setdefault(match["rule"], [])
        elif match["repeat"] is not None:
            least = (match["least"] or "").strip()
            body.append(("repeat", match["repeat"] if match["least"] is None else ("+" if least.strip("0") else "*")))
        elif kind != "skip":
            body.append((kind, match["text"] if kind == "text" else match[0]))
    return found


class _Reader:
    """Reads the tokens of a rule's body.

    Args:
        empty: rules that an empty text fits.
    """

    def __init__(self, body: list[Token], empty: set[str], steps: _Steps) -> None:
        self._body, self._empty, self._steps = body, empty, steps
        self._at = self._nested = 0

    def alternatives(self) -> _Part:
        found = self._sequence()
        while self._next() == "or":
            self._at += 1
            other = self._sequence()
            found = _Part(
                found.first | other.first,
                found.last | other.last,
                found.beside | other.beside,
                found.empty or other.empty,
            )
        return found

    def _next(self) -> str:
        return self._body[self._at][0] if self._at < len(self._body) else ""

    def _sequence(self) -> _Part:
        found = _Part(empty=True)
        while self._next() not in ("", "or", "close"):
            found = self._joined(found, self._repeated(self._element()))
        return found

    def _element(self) -> _Part:
        kind, text = self._body[self._at]
        self._at += 1
        self._steps.take(1)
        if kind == "open":
            self._nested += 1
            if self._nested > MAX_NESTED:
                raise TooLargeError(f"it has more than {MAX_NESTED} parentheses in each other; write rules instead")
            inner = self.alternatives()
            self._nested -= 1
            self._at += 1  # the closing one
            return inner
        if kind == "name":
            return _Part({text}, {text}, set(), text in self._empty)
        return _Part(empty=kind == "text" and not text)

    def _repeated(self, part: _Part) -> _Part:
        while self._next() == "repeat":
            sign = self._body[self._at][1]
            self._at += 1
            if sign != "?":
                part = _Part(part.first, part.last, self._joined(part, part).beside, part.empty)
            part.empty = part.empty or sign in "*?"
        return part

    def _joined(self, before: _Part, after: _Part) -> _Part:
        """One part and then another."""
        self._steps.take(len(before.last) * len(after.first))
        return _Part(
            before.first | (after.first if before.empty else set()),
            after.last | (before.last if after.empty else set()),
            before.beside | after.beside | {(left, right) for left in before.last for right in after.first},
            before.empty and after.empty,
        )


def _closure(direct: dict[str, set[str]], steps: _Steps) -> dict[str, set[str]]:
    """Each name's own names, theirs, and so on, and itself."""
    found = {}
    for name in direct:
        known, left = {name}, [name]
        while left:
            given = direct.get(left.pop(), set())
            steps.take(1 + len(given))
            new = given - known
            known |= new
            left += new
        found[name] = known
    return found
