"""The commands of the documents: each is run by a test or says why not, and `qaq` knows its options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from services.cli.main import app

from .commands import NOT_RUN, RUN_BY
from .test_docs import PAGES, names_of_tests


def blocks() -> Iterator[str]:
    """The commands of the blocks of code for a shell, without what is said behind them."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                command = re.split(r"\s{2,}#|\s+# ", line)[0].strip()
                if command and not command.startswith("#"):
                    yield command


def quoted() -> Iterator[str]:
    """The commands of qaq in the text."""
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        yield from re.findall(r"`(qaq [a-z][^`\n]*)`", prose)


COMMANDS = sorted(set(blocks()))
OF_QAQ = sorted(
    command for command in {*COMMANDS, *quoted()} if re.match(r"([A-Z_]+=\S+ )*(\.venv/bin/)?qaq [a-z]", command)
)


def beginning(command: str) -> str | None:
    """The longest known beginning of a command."""
    return max((known for known in {**RUN_BY, **NOT_RUN} if command.startswith(known)), key=len, default=None)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_run_or_says_why_not(command: str) -> None:
    assert beginning(command) is not None, "add it to tests/docs/commands.py"


def test_nothing_is_said_of_commands_that_are_gone() -> None:
    assert {*RUN_BY, *NOT_RUN} == {beginning(command) for command in COMMANDS}


def test_the_tests_exist() -> None:
    named = {*RUN_BY.values(), *(name for why in NOT_RUN.values() for name in re.findall(r"test_\w+", why))}
    assert named - names_of_tests() == set()


@pytest.mark.parametrize("command", OF_QAQ)
def test_qaq_knows_the_command_and_its_options(command: str) -> None:
    words = shlex.split(command[command.index("qaq ") :].replace("'…'", "…"), comments=True)[1:]
    group: Any = get_command(app)
    while (commands := getattr(group, "commands", None)) is not None:
        if not words or words[0].startswith("-"):
            return  # it names a group alone, such as `qaq bench`
        assert words[0] in commands, f"qaq has no {words[0]}"
        group = commands[words.pop(0)]
    known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert given - known - {"--help"} == set()
