"""Grammars whose texts have too many readings."""

from __future__ import annotations

import pytest

from services.common.grammars import MAX_STEPS, TooLargeError, beside_itself

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws  # "root root"
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= root root root | [a-z]",
        'root ::= "x" item\nitem ::= "a" | item item',
        'root ::= x\nx ::= y y | "a"\ny ::= x | "b"',
        'root ::= x x | "a"\nx ::= root root | "b"',
        'root ::= "a" | root ws root\nws ::= " "*',
        'root ::= "a" | root "" root',
        'root ::= "a" | (root)* "b"',
        'root ::= "a" | root{2} "b"',
        'root ::= "a" | ("(" | root) (root | ")")',
        'root ::= "a" | y? root y?\ny ::= root',
    ],
)
def test_a_rule_beside_itself(grammar: str) -> None:
    assert beside_itself(grammar) in ("root", "item", "x", "y")


@pytest.mark.parametrize(
    "grammar",
    [
        JSON,
        'root ::= "a" root | "b"',
        'root ::= root "a" | "b"',
        'root ::= root "+" root | [0-9]+',
        'root ::= "(" root ")" root | ""',
        'root ::= item+\nitem ::= "- " [^\\n]+ "\\n"',
        'root ::= word (" " word)*\nword ::= [a-z]+',
        'root ::= x x\nx ::= "a"',
        'root ::= "a{2} root root" | [root root]',
        "",
        "no grammar ( at all",
        ")))) ::= (((",
        "[" * 64_000,  # these took minutes
        '"' + '\\"' * 32_000,
        "{" * 64_000,
    ],
)
def test_others(grammar: str) -> None:
    assert beside_itself(grammar) is None


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 1000,
        "root ::= " + " ".join(f"r{n}?" for n in range(2000)),
        "\n".join(f"r{n} ::= r{n + 1}" for n in range(3000)) + '\nr3000 ::= ""',
    ],
)
def test_what_cannot_be_searched(grammar: str) -> None:
    with pytest.raises(TooLargeError):
        beside_itself(grammar)


def test_a_large_grammar_is_searched() -> None:
    grammar = "root ::= r0\n" + "\n".join(f'r{n} ::= "x" r{n + 1} | [a-z]{{2,5}} | r{n + 1} "y"' for n in range(150))
    assert len(grammar) < MAX_STEPS
    assert beside_itself(grammar) is None
