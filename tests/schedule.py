"""Which tests share a process, and in what order files run: stacks are started once, and nobody waits at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling

# How a path below tests/ begins. What takes longest comes first: short files fill the gaps at the end.
FIRST = (
    "faults/test_chaos",
    "faults/test_processes",
    "faults/test_redis",
    "e2e/test_up",
    "services/cluster/test_interrupted",
    "e2e/test_demo",
    "e2e/",
    "packaging/",
    "examples/",
    "eval/cli/",
    "fuzz/",
    "services/worker/",
    "core/models/test_compiled",
    "core/kernels/",
    "services/gateway/",
)
# Files that use one stack of processes.
TOGETHER = (
    {f"e2e/test_{name}.py": "the composed stack" for name in ("bench_serve", "clients", "compose", "requests", "top")}
    | {f"faults/test_{name}.py": "two workers" for name in ("chaos", "processes", "redis")}
    | {f"packaging/test_{name}.py": "the wheel" for name in ("light", "wheel")}
)


def rank(path: str) -> int:
    """Where a file, by its path below tests/, stands in the order."""
    return next((place for place, prefix in enumerate(FIRST) if path.startswith(prefix)), len(FIRST))


def group(path: str) -> str:
    """What runs in one process: a file, or files that share a stack."""
    return TOGETHER.get(path, path)


def make(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Groups go to the next free process, in the order in which they were collected."""
    from xdist.scheduler import LoadFileScheduling

    class Grouped(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(super()._split_scope(nodeid).removeprefix("tests/"))

    config.option.loadscopereorder = False
    return Grouped(config, log)
