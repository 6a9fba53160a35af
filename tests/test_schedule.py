"""The order of the tests names files that are there, and files that share a stack run in one process."""

from __future__ import annotations

from pathlib import Path

from tests import schedule

HERE = Path(__file__).parent
FILES = sorted(path.relative_to(HERE).as_posix() for path in HERE.rglob("test_*.py"))


def test_what_comes_first_is_there() -> None:
    assert {schedule.rank(path) for path in FILES} == set(range(len(schedule.FIRST) + 1))
    assert schedule.rank("faults/test_chaos.py") == 0
    assert schedule.rank("core/base/test_rows.py") == len(schedule.FIRST)


def test_files_that_share_a_stack_are_together() -> None:
    assert set(schedule.TOGETHER) <= set(FILES)
    for path in FILES:
        if path.startswith("e2e/") and "composed: Composed" in (HERE / path).read_text():
            assert schedule.group(path) == "the composed stack"
    assert schedule.group("core/base/test_rows.py") == "core/base/test_rows.py"
