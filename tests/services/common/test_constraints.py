"""Limits of constraints."""

from __future__ import annotations

import contextlib
import json

import pytest
from qaq.v1.common_pb2 import Constraint

from services.common import constraints
from services.common.errors import InvalidArgument

KIB = 1024


def nested(levels: int) -> str:
    return '{"items": ' * levels + "{}" + "}" * levels


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(),
        Constraint(json_object=True),
        Constraint(json_schema=nested(63)),
        Constraint(json_schema=json.dumps({"const": "[" * 1000})),
        Constraint(regex="x" * 4 * KIB),
        Constraint(regex="[a-z]{1,1000}"),
        Constraint(regex=r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})"),
        Constraint(regex=r"\{[a-z]{1,100}\}([a-z]{3}-){2,5}(a|b+)*[^\]]{2,3}"),
        Constraint(grammar='root ::= [a-z]{1,100} "x"{2,3} pair{2} ("a" | "b")*\npair ::= "p"'),
        Constraint(grammar="x" * 64 * KIB),
        Constraint(regex=r"([0-9]{1,3}\.){3}[0-9]{1,3}"),
        Constraint(grammar='root ::= ("a" | [b-d]{2}){1,9} word{1,5}  # (word{1,5}){1,5}\nword ::= [a-z]+ "{1,5}"'),
        Constraint(grammar='root ::= (word " "){3} other-word*\nword ::= [a-z]{1,9}\nother-word ::= word "word{1,9}"'),
        Constraint(grammar='root ::= list{1,4}\nlist ::= "x" | "(" list ")"'),
        Constraint(choice=Constraint.Choice(texts=[str(i) for i in range(1024)])),
    ],
)
def test_accepts_the_edges(constraint: Constraint) -> None:
    constraints.check(constraint)


@pytest.mark.parametrize(
    "text",
    ["{" * 4000, "{" + " " * 4000, "{1" * 2000, "{ , " * 1000, '"' + '\\"' * 2000, "(" * 4000, "[" * 4000, "\\" * 4001],
)
def test_checks_take_time_in_proportion_to_the_text(text: str) -> None:
    """Each of them kept a check busy for minutes to days whose time grew with a power of the length."""
    for constraint in (
        Constraint(regex=text),
        Constraint(grammar=text * 16),
        Constraint(json_schema=json.dumps({"pattern": text})),
        Constraint(structural_tag=text * 60),
    ):
        with contextlib.suppress(InvalidArgument):
            constraints.check(constraint)


@pytest.mark.parametrize(
    ("constraint", "sentence"),
    [
        (Constraint(json_object=False), "json_object is false"),
        (Constraint(json_schema=""), "json_schema is empty"),
        (Constraint(json_schema=" " * (64 * KIB + 1)), "json_schema is 65537 bytes of UTF-8; send at most 65536"),
        (Constraint(json_schema=nested(64)), "more than 64 levels deep; send at most 64"),
        (Constraint(json_schema="[" * 60_000), "json_schema is too many levels deep"),
        (Constraint(json_schema="[" * 30_000 + "]" * 30_000), "json_schema is too many levels deep"),
        (Constraint(json_schema="{"), "json_schema is not JSON"),
        (
            Constraint(json_schema='{"a": {"pattern": "(a+)+", "pattern": "a"}}'),
            'the key "pattern" twice; send it once',
        ),
        (Constraint(structural_tag='{"grammar": "x", "grammar": "y"}'), 'the key "grammar" twice'),
        (Constraint(json_schema='{"pattern": "a{1,100000}"}'), "repeats something 100000 times"),
        (Constraint(json_schema='{"patternProperties": {"a{1001}": {}}}'), "repeats something 1001 times"),
        (Constraint(regex="x" * (4 * KIB + 1)), "regex is 4097 bytes"),
        (Constraint(regex=".{1,100000}"), "regex repeats something 100000 times; write at most 1000"),
        (Constraint(regex=".{5000,}"), "regex repeats something 5000 times"),
        (Constraint(grammar="root ::= [a-z]{1, 100000}"), "grammar repeats"),
        (Constraint(grammar="x" * (64 * KIB + 1)), "grammar is 65537 bytes"),
        (Constraint(choice=Constraint.Choice()), "choice has 0 texts; send 1 to 1024"),
        (Constraint(choice=Constraint.Choice(texts=["x"] * 1025)), "choice has 1025 texts"),
        (Constraint(choice=Constraint.Choice(texts=["a", ""])), "an empty text"),
        (Constraint(choice=Constraint.Choice(texts=["a", "a"])), "the same text twice"),
        (Constraint(choice=Constraint.Choice(texts=["x" * 64 * KIB, "y"])), "choice is 65537 bytes"),
        (Constraint(structural_tag="[" * 100 + "]" * 100), "more than 64 levels deep"),
        (Constraint(structural_tag="{" * 100), "structural_tag is not JSON"),
        (Constraint(regex="(.{0,1000}){0,1000}x"), "range of repeats inside"),
        (Constraint(regex="((.{0,10}){0,10}){0,10}x"), "range of repeats inside"),
        (Constraint(regex="(.{0,10})*x"), "range of repeats inside"),
        (Constraint(regex="((a|b.{1,2}c)d)+"), "range of repeats inside"),
        (Constraint(grammar='root ::= a{0,10}\na ::= "b"{0,10}'), "range of repeats inside"),
        (Constraint(grammar='root ::= a  {0,10}\na ::= "b"{0,10}'), "range of repeats inside"),
        (Constraint(grammar='root ::= (c "x" a)? {0,10}\na ::= [^a]{0,10}'), "range of repeats inside"),
        (Constraint(grammar='a::=c{0,10}\nc::=d |\n "x"\nd::=(e)\ne::="b"{2,3}'), "range of repeats inside"),
        (Constraint(grammar='root ::= "x" | "(" root{1,5} ")"'), "range of repeats inside"),
        (Constraint(grammar='root ::= ([a-z]{1,5} "b")+'), "range of repeats inside"),
        (Constraint(regex="([a-z]{1,5}){3}"), "at most 12 times together"),
        (Constraint(regex="(([a-z]{1,3}){2}){3}"), "range of repeats inside"),
        (
            Constraint(structural_tag=json.dumps({"grammar": "root ::= a{0,10}\na ::= b\nb ::= [a-z]{0,10}"})),
            "range of repeats inside",
        ),
        (Constraint(regex="(ab{20}){500}"), "pieces when its repeats"),
        (Constraint(regex=".{0,900}" * 5), "regex is some 4500 pieces"),
        (Constraint(regex="a{" + " " * 3000 + "5}"), "count of repeats that is too long"),
        (Constraint(grammar='root ::= "a"{' + "1" * 5000 + "}"), "count of repeats that is too long"),
        (Constraint(json_schema=json.dumps([{"pattern": ".{900}"}] * 5)), "pieces when its repeats"),
        (Constraint(structural_tag=json.dumps([{"pattern": "[^a]{2,90}.*b"}] * 50)), "pieces when its repeats"),
        (Constraint(json_schema=json.dumps({"properties": {str(i): {} for i in range(513)}})), "513 properties"),
        (Constraint(structural_tag=" " * (256 * KIB + 1)), "structural_tag is 262145 bytes"),
    ],
)
def test_refuses_with_what_to_change(constraint: Constraint, sentence: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        constraints.check(constraint)
    assert sentence in caught.value.message
