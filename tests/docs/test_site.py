"""The site: its pages, its links, its pictures and its reference are those of the repository."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import gen_reference, pictures, site

from .test_docs import PAGES, ROOT, names, prose

DOCS = ROOT / "docs"
ADDRESS = re.compile(r"https?://(?:[a-z0-9-]+\.)+[a-z]{2,}(?::\d+)?(?:/[\w./~%+,;=@:!*'?&#()-]*)?$")


class Loader(yaml.SafeLoader):
    """Of a configuration with names of Python functions, which are not called."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.fixture(scope="module")
def config() -> Any:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # a SafeLoader


def pages_of(nav: list[Any]) -> list[str]:
    found = []
    for entry in nav:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            found += pages_of(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_navigation_once(config: Any) -> None:
    there = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(pages_of(config["nav"])) == there


def test_warnings_are_errors_and_nothing_comes_from_elsewhere(config: Any) -> None:
    assert config["strict"] is True
    assert config["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css"} & set(config)


@pytest.mark.parametrize(
    ("page", "target", "path"),
    [
        ("core.md", "../qaq_core/cache/cache.py", "qaq_core/cache/cache.py"),
        ("deploy/compose.md", "../../deploy/helm", "deploy/helm"),
        ("deploy/compose.md", "../security.md#redis", None),
        ("core.md", "method.md", None),
        ("core.md", "#limits", None),
        ("core.md", "https://example.com/../x", None),
        ("what.md", "results/speed/decode-4096-quanto", "docs/results/speed/decode-4096-quanto"),
        ("README.md", "../SECURITY.md", "SECURITY.md"),
    ],
)
def test_what_lies_outside_the_pages_is_known(page: str, target: str, path: str | None) -> None:
    assert site.outside(page, target) == path


def test_links_to_files_lead_to_their_copies() -> None:
    text = "[a](../qaq_core/py.typed) [b](method.md)\n```sh\n[c](../qaq_core/py.typed)\n```\n[d](../qaq_core)"
    assert site.rewritten("core.md", text) == (
        "[a](source/qaq_core/py.typed.txt) [b](method.md)\n```sh\n[c](../qaq_core/py.typed)\n```\n"
        "[d](source/qaq_core/index.html)"
    )
    assert site.rewritten("deploy/x.md", "[a](../../LICENSE)") == "[a](../source/LICENSE.txt)"


def test_the_diagram_is_a_picture_on_the_site() -> None:
    shown = site.rewritten("README.md", (DOCS / "README.md").read_text())
    assert "mermaid" not in shown
    assert "](pictures/overview.svg)" in shown


def test_every_file_that_is_linked_is_copied() -> None:
    wanted = site.wanted()
    assert {"SECURITY.md", "proto/qaq/v1", "proto/qaq/v1/worker.proto"} <= wanted
    assert all((ROOT / path).exists() for path in wanted)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_addresses_of_others_are_well_formed(page: Path) -> None:
    """Whether they answer is not asked."""
    found = re.findall(r"\]\((https?:[^)\s]*)\)", "\n".join(prose(page)))
    assert [address for address in found if not ADDRESS.match(address)] == []


@pytest.mark.parametrize("path", gen_reference.pages(), ids=lambda path: path.name)
def test_the_reference_is_that_of_the_code(path: Path) -> None:
    assert path.read_text() == gen_reference.pages()[path], "run python tools/gen_reference.py"


@pytest.mark.parametrize("path", pictures.pictures(), ids=lambda path: path.name)
def test_the_pictures_are_those_of_the_results(path: Path) -> None:
    assert path.read_text() == pictures.pictures()[path], "run python -m tools.pictures"


def test_a_picture_shows_what_was_measured() -> None:
    rows = json.loads((DOCS / "results/speed/decode-4096-llama.cpp/run-1.json").read_text())["result"]["rows"]
    (held,) = [row["kv_bytes"] for row in rows if row["cache"] == "balanced"]
    assert f">{held / 1e6:.1f} MB<" in pictures.memory()


def test_targets_to_choose_from_are_measured() -> None:
    table = re.findall(
        r"^\| [^|]+ \| `([^`]+)` \| [^|]* ([\d,]+)(?:, [^|]*)? \| ([\d.]+)x \| ([\d.]+) \| \[[^]]*\]\(([^)]+)\) \|$",
        (DOCS / "choosing.md").read_text(),
        re.MULTILINE,
    )
    assert len(table) >= 10
    for config, context, compression, kl, source in table:
        rows = json.loads((DOCS / source).read_text())["result"]["rows"]
        (row,) = [row for row in rows if row["config"] == config]
        assert f"{row['context']:,}" == context
        assert (f"{row['compression']:.2f}", f"{row['kl_mean']:.4f}") == (compression, kl)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("material") is None, reason="the site needs the extra docs: make docs")
def test_it_is_built_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "start" / "index.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=[\"']?https?:", page)
    assert (tmp_path / "site" / "source" / "SECURITY.md.txt").exists()
