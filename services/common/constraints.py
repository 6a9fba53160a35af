"""Limits of constraints, checked before anything parses them: by the router, and again by the worker that compiles."""

from __future__ import annotations

import re
from typing import Any

from qaq.v1 import common_pb2

from services.common.errors import InvalidArgument
from services.common.grammars import TooLargeError, beside_itself
from services.common.json_text import check_size, parsed, parts
from services.common.limits import (
    MAX_CHOICE_BYTES,
    MAX_CHOICE_TEXTS,
    MAX_EXPANDED,
    MAX_GRAMMAR_BYTES,
    MAX_PROPERTIES,
    MAX_REGEX_BYTES,
    MAX_REPEATS,
    MAX_SCHEMA_BYTES,
    MAX_STRUCTURAL_TAG_BYTES,
)

# A count of repeats. Its length is bounded, so that a search takes time in proportion to the text.
_COUNTS = re.compile(r"\{([\d\s,]{0,32})\}")
_NUMBERS = re.compile(r"\d+")
_LONG_COUNTS = re.compile(r"\{[\d\s,]{33}")
# The parts of a grammar: literals and character classes, comments and whitespace, names of rules. Each of them matches
# to the end of the text if it is not closed, so that all of them together take time in proportion to the text.
_PARTS = re.compile(
    r"""(?P<literal>"(?:[^"\\\n]|\\.)*"?|\[(?:[^\]\\]|\\.)*\]?)|(?P<blank>(?:\s|\#[^\n]*)+)|(?P<name>[A-Za-z_][\w.-]*)"""
    r"""|(?P<defined>::=)|(?P<range>\{[\d\s]{0,32},[\d\s]{0,32}\})"""
)
# Whether a part has a range of repeats inside: none, in a rule that it names, or in itself.
_PLAIN, _NAMES_RANGE, _HAS_RANGE = 0, 1, 2
# A range of repeats may stand in a part with a fixed count if the two are no more than this together, as in an IP
# address: ([0-9]{1,3}\.){3}.
_FEW = 12


def check(request: common_pb2.Constraint) -> None:
    """Raises:
    InvalidArgument: names the field and its limit.
    """
    match request.WhichOneof("kind"):
        case "json_schema":
            check_size("constraint.json_schema", request.json_schema, MAX_SCHEMA_BYTES)
            _patterns("constraint.json_schema", [parsed("constraint.json_schema", request.json_schema)])
        case "json_object" if not request.json_object:
            raise InvalidArgument("constraint.json_object is false; send true, or no constraint")
        case "regex":
            check_size("constraint.regex", request.regex, MAX_REGEX_BYTES)
            _check_expanded("constraint.regex", _expanded("constraint.regex", request.regex))
        case "grammar":
            check_size("constraint.grammar", request.grammar, MAX_GRAMMAR_BYTES)
            _check_expanded("constraint.grammar", _expanded("constraint.grammar", request.grammar, rules=True))
            _unambiguous("constraint.grammar", request.grammar)
        case "choice":
            _choice(request.choice)
        case "structural_tag":
            check_size("constraint.structural_tag", request.structural_tag, MAX_STRUCTURAL_TAG_BYTES)
            _patterns("constraint.structural_tag", [parsed("constraint.structural_tag", request.structural_tag)])


def _choice(choice: common_pb2.Constraint.Choice) -> None:
    texts = choice.texts
    if not 1 <= len(texts) <= MAX_CHOICE_TEXTS:
        raise InvalidArgument(f"constraint.choice has {len(texts)} texts; send 1 to {MAX_CHOICE_TEXTS}")
    if not all(texts):
        raise InvalidArgument("constraint.choice has an empty text; leave it out")
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_CHOICE_BYTES:
        raise InvalidArgument(f"constraint.choice is {size} bytes of UTF-8; send at most {MAX_CHOICE_BYTES}")
    if len(set(texts)) < len(texts):
        raise InvalidArgument("constraint.choice has the same text twice; send it once")


def _patterns(field: str, level: list[Any]) -> None:
    """Checks the regular expressions, grammars and properties in a schema or a structural tag."""
    size = properties = 0
    while level:
        for value in level:
            if isinstance(value, dict):
                named = value.get("patternProperties")
                patterns = [value.get("pattern"), *(named if isinstance(named, dict) else ())]
                size += sum(_expanded(field, pattern) for pattern in patterns if isinstance(pattern, str))
                if isinstance(grammar := value.get("grammar"), str):
                    size += _expanded(field, grammar, rules=True)
                    _unambiguous(field, grammar)
                declared = value.get("properties")
                properties += len(declared) if isinstance(declared, dict) else 0
        level = [part for whole in level for part in parts(whole)]
    _check_expanded(field, size)
    if properties > MAX_PROPERTIES:
        raise InvalidArgument(f"{field} declares {properties} properties; declare at most {MAX_PROPERTIES}")


def _unambiguous(field: str, grammar: str) -> None:
    """Checks that a grammar's texts cannot be read in ever more ways."""
    try:
        name = beside_itself(grammar)
    except TooLargeError as error:
        raise InvalidArgument(f"{field} cannot be checked: {error}") from error
    if name is not None:
        raise InvalidArgument(
            f'{field} lets the rule "{name[:100]}" stand beside itself, as in x ::= "a" | x x, so that a text has too '
            "many readings; write a text in between, or repeat with * or +"
        )


def _expanded(field: str, text: str, rules: bool = False) -> int:
    """About how many pieces a pattern or grammar is when its repeats are written out, an upper bound.

    Large counts, as in [a-z]{1,100000} or (.{0,1000}){0,1000}, take minutes to compile and to follow.
    """
    if _LONG_COUNTS.search(text):
        raise InvalidArgument(
            f"{field} has a count of repeats that is too long; write at most {MAX_REPEATS}, or * or +"
        )
    counts = [max(map(int, found), default=1) for found in map(_NUMBERS.findall, _COUNTS.findall(text))]
    if max(counts, default=0) > MAX_REPEATS:
        raise InvalidArgument(f"{field} repeats something {max(counts)} times; write at most {MAX_REPEATS}, or * or +")
    return _nested(field, text, rules) + len(text) // 64


def _nested(field: str, text: str, rules: bool) -> int:
    """The pieces of a text in parentheses, each times the counts behind it and behind those around it.

    Args:
        rules: the text is a grammar, in which a word is the name of a rule.
    Raises:
        InvalidArgument: a part that is repeated often has a range of repeats inside: the ways to read a text are too
            many to follow.
    """
    ranged = _ranged_rules(text) if rules else set()
    sizes, ranges, repeats = [0], [_PLAIN], [1]
    last, inner, most, at = 0, _PLAIN, 1, 0
    while at < len(text):
        sign, end = text[at], at + 1
        counted = _COUNTS.match(text, at) if sign == "{" else None
        part = _PARTS.match(text, at) if rules and not counted else None
        if counted or sign in "*+":
            numbers = _NUMBERS.findall(counted[1]) if counted else []
            varies = counted is not None and "," in counted[1]
            times = max(map(int, numbers), default=_FEW) * (most if inner else 1)
            if (inner == _HAS_RANGE and (varies or times > _FEW)) or (inner and varies):
                raise InvalidArgument(
                    f"{field} repeats a part that has a range of repeats inside, as in ([a-z]{{1,5}}){{1,5}}; give the "
                    f"inner one a fixed count or none, or the outer one a small one: at most {_FEW} times together"
                )
            if varies or inner == _HAS_RANGE:
                ranges[-1], repeats[-1] = _HAS_RANGE, max(repeats[-1], times)
            sizes[-1] += last * (max(map(int, numbers), default=1) - 1)
            end = counted.end() if counted else end
            inner = _PLAIN
        elif part and (part["literal"] or part["name"]):
            end, last = part.end(), 1
            inner = _NAMES_RANGE if part["name"] in ranged else _PLAIN
            ranges[-1] = max(ranges[-1], inner)
            sizes[-1] += sign == "["
        elif part and part["blank"]:
            end = part.end()
        elif sign == "(":
            sizes.append(0)
            ranges.append(_PLAIN)
            repeats.append(1)
        elif sign == ")" and len(sizes) > 1:
            last, inner, most = sizes.pop(), ranges.pop(), repeats.pop()
            sizes[-1] += last
            ranges[-1], repeats[-1] = max(ranges[-1], inner), max(repeats[-1], most)
        else:
            closed = text.find("]", at + 2) if sign == "[" else -1
            end = closed + 1 if closed > 0 else at + 1 + (sign == "\\")
            last, inner = 1, inner if sign == "?" else _PLAIN
            sizes[-1] += sign in ".[\\"
        at = end
    return sum(sizes)


def _ranged_rules(grammar: str) -> set[str]:
    """The rules in which a range of repeats is, in their own body or in that of a rule that they name."""
    ranged: set[str] = set()
    users: dict[str, set[str]] = {}
    rule = name = ""
    for part in _PARTS.finditer(grammar):
        if part["blank"]:
            continue
        if part["defined"]:
            rule = name
        elif name:
            users.setdefault(name, set()).add(rule)
        name = part["name"] or ""
        if part["range"]:
            ranged.add(rule)
    users.setdefault(name, set()).add(rule)
    reached = list(ranged)
    while reached:
        new = users.get(reached.pop(), set()) - ranged
        ranged |= new
        reached += new
    return ranged


def _check_expanded(field: str, size: int) -> None:
    if size > MAX_EXPANDED:
        raise InvalidArgument(
            f"{field} is some {size} pieces when its repeats are written out; at most {MAX_EXPANDED} are accepted: "
            "use smaller counts, or * or +"
        )
