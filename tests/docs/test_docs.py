"""The documents: links lead somewhere, names exist in the code, lines are not too long."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 120

PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for page in (ROOT / "docs").rglob("*.md") if "results" not in page.parts)],
    key=str,
)
SOURCES = ("qaq_core", "qaq_eval", "services", "examples", "proto")
# Whose variables and values are named.
DEPLOYMENT = ("docker-compose.yml", "deploy/Dockerfile", "deploy/helm/qaq/values.yaml")

# Names of others: variables of OpenMP, Triton and CUDA, one of the paper's code, a pattern of names, OpenAI's fields
# that are refused.
ELSEWHERE = {
    "web_search_options",
    "OMP_WAIT_POLICY",
    "TORCH_INDEX",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "q_norm",
    "kAvB",
}


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def prose(page: Path) -> list[str]:
    """Its lines outside code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).splitlines()


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links, as GitHub makes it."""
    headings = [line.lstrip("#") for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@cache
def known_names() -> frozenset[str]:
    """Every word of the code, every setting as a variable of the environment, every file."""
    files = [path for source in SOURCES for kind in ("py", "proto") for path in (ROOT / source).rglob(f"*.{kind}")]
    files += [ROOT / name for name in DEPLOYMENT]
    words = {word for path in files for word in re.findall(r"[A-Za-z_]\w+", path.read_text())}
    stems = {path.stem for source in SOURCES for path in (ROOT / source).rglob("*.*")}
    return frozenset(words | {f"QAQ_{word.upper()}" for word in words} | stems | names_of_tests() | ELSEWHERE)


def names_of_tests() -> set[str]:
    """The names of all tests."""
    return {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_names_are_in_the_code(page: Path) -> None:
    """`CamelCase`, `name.of_method`, `snake_case` and `CONSTANT` in backticks."""
    lost = []
    for quoted in re.findall(r"`([^`\n]+)`", "\n".join(prose(page))):
        if not re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", quoted) or quoted.endswith((".md", ".json", ".jsonl", ".gguf")):
            continue
        words = [word for word in quoted.removesuffix("()").split(".") if len(word) > 1]
        in_code = [word for word in words if "_" in word or re.search(r"[a-z][A-Z]|^[A-Z]", word)]
        lost += [quoted for word in in_code if word not in known_names()]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_lines_are_not_too_long(page: Path) -> None:
    """Tables and links apart, which cannot be broken."""
    long = [line for line in prose(page) if len(line) > LONGEST and not line.startswith(("|", "    "))]
    assert not long


def test_every_failure_is_shown_by_a_test() -> None:
    """Each row of the first table names one that exists."""
    table = (ROOT / "docs" / "failures.md").read_text().partition("\n## How it is noticed")[0]
    rows = re.findall(r"^\| (?!event|---)(.+) \|$", table, re.MULTILINE)
    assert len(rows) > 20
    for row in rows:
        shown = re.findall(r"`(test_\w+)`", row.rpartition("|")[2])
        assert shown, row
        assert set(shown) <= names_of_tests(), row


def test_every_page_is_reached() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ] == []


def test_the_readmes_table_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "docs" / "results" / "quality" / "baselines.json").read_text())
    known = {
        row["config"]: (f"{row['compression']:.2f}x", f"{row['kl_mean']:.4f}") for row in measured["result"]["rows"]
    }
    written = re.findall(r"^\| `([^`]+)`.*? \| (\S+) \| (\S+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(written) > 4
    assert all(known[config] == tuple(figures) for config, *figures in written)
