"""Hooks of the documentation site (mkdocs.yml). Pages stay as the repository shows them; two things differ.

Links to files outside docs/ lead to copies of these files, as text, or to the list of a folder. The diagram in Mermaid,
which the repository's viewer draws, is a picture, so that the site loads nothing from elsewhere.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SOURCE = "source"
"""Folder of the site with what lies outside docs/."""
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
DIAGRAM = re.compile(r"^```mermaid$.*?^```$", re.DOTALL | re.MULTILINE)
PICTURE = "pictures/overview.svg"


def outside(page: str, target: str) -> str | None:
    """The path, from the root of the repository, of a link on a page of docs/; None if it stays in docs/.

    Args:
        page: path below docs/. target: as written.
    """
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", target):
        return None
    whole = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path))
    inside = whole == "docs" or whole.startswith("docs/")
    # A folder of docs/ has no page, but its files are there.
    return whole if not inside or (ROOT / whole).is_dir() else None


def copied(path: str) -> str:
    """Where the site has a file or folder of the repository."""
    return f"{SOURCE}/{path}/index.html" if (ROOT / path).is_dir() else f"{SOURCE}/{path}.txt"


def rewritten(page: str, markdown: str) -> str:
    """The page with the links of the site. Blocks of code stay as they are."""

    def replaced(match: re.Match[str]) -> str:
        path = outside(page, match[2])
        if path is None:
            return match[0]
        return f"{match[1]}{os.path.relpath(copied(path), posixpath.dirname(page) or '.')}{match[3]}"

    def prose(text: str) -> str:
        return LINK.sub(replaced, text)

    picture = os.path.relpath(PICTURE, posixpath.dirname(page) or ".")
    markdown = DIAGRAM.sub(f"![clients, router, workers, cache services and Redis]({picture})", markdown)
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [prose(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, prose(markdown[last:])])


def wanted() -> set[str]:
    """Every path outside docs/ that a page links to, with the files of linked folders."""
    found = set()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        for match in LINK.finditer(FENCE.sub("", page.read_text("utf-8"))):
            if (path := outside(name, match[2])) is not None:
                found.add(path)
    return found | {file for folder in found if (ROOT / folder).is_dir() for file in _files(folder)}


def _files(folder: str) -> list[str]:
    """The tracked files directly in a folder."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--", folder], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [file for file in listed if posixpath.dirname(file) == folder.rstrip("/") and _is_text(ROOT / file)]


def _is_text(path: Path) -> bool:
    return path.is_file() and b"\0" not in path.read_bytes()[:4096]


def _listing(folder: str) -> str:
    rows = "".join(
        f"<li><a href='{html.escape(posixpath.basename(file))}.txt'>{html.escape(posixpath.basename(file))}</a></li>"
        for file in _files(folder)
    )
    name = html.escape(folder)
    return f"<!doctype html><meta charset='utf-8'><title>{name}</title><h1>{name}</h1><ul>{rows}</ul>\n"


# -- called by MkDocs ----------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in sorted(wanted()):
        content = _listing(path) if (ROOT / path).is_dir() else (ROOT / path).read_bytes()
        files.append(File.generated(config, copied(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    return rewritten(page.file.src_uri, markdown)
