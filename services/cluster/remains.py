"""What a stack consists of on this machine, its processes and its directory, and the end of both.

Every process of a stack has the stack's directory in its environment, under MARK, or descends from one that has. Redis
and some of Ray's processes write their titles over their environment, but have files open in the directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import psutil

MARK = "QAQ_STACK"
PREFIX = "qaq-"
"""What the names of stacks' directories begin with."""
TERMINATE_S = 3.0
KILL_S = 5.0
_ROUNDS = 5
# A Unix socket's path is limited to 107 bytes, of which Ray uses up to 64, and our names 16.
_MAX_TMP_BYTES = 27
_REDIS = ("redis-server", "valkey-server")
_RAY = "ray::"


def base() -> Path:
    """Where the directories of stacks are.

    Raises:
        FileNotFoundError: there is no temporary directory.
    """
    chosen = Path(tempfile.gettempdir()).resolve()
    return chosen if len(str(chosen)) <= _MAX_TMP_BYTES else Path("/tmp").resolve()


def processes(directory: Path, *, descendants: bool = False) -> list[psutil.Process]:
    """The processes of the stack with this directory, without this one.

    Args:
        descendants: those of this process belong to the stack, too.
    """
    roots = [psutil.Process()] if descendants else []
    roots += [process for process in psutil.process_iter() if _marked(process, directory)]
    found = set(roots)
    for root in roots:
        with contextlib.suppress(psutil.Error):
            found.update(root.children(recursive=True))
    return [process for process in found if process.pid != os.getpid() and runs(process)]


def clear(directory: Path, *, descendants: bool = False) -> None:
    """Ends the processes of a stack and removes its directory. Arguments as of `processes`.

    psutil compares birth times, so a later process with the pid of one that has ended is left alone.
    """
    for attempt in range(_ROUNDS):  # one that ends may just have started another
        found = processes(directory, descendants=descendants)
        if not found:
            break
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate() if attempt == 0 else process.kill()
        psutil.wait_procs(found, TERMINATE_S if attempt == 0 else KILL_S)
    shutil.rmtree(directory, ignore_errors=True)


def _marked(process: psutil.Process, directory: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        if process.uids().real != os.getuid():
            return False
        if process.environ().get(MARK) == str(directory):
            return True
        title = next(iter(process.cmdline()), "")
        if process.name() in _REDIS or title.startswith(_RAY):
            files = [process.cwd(), *(file.path for file in process.open_files())]
            return any(Path(file).is_relative_to(directory) for file in files)
    return False


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended, not even as one that nobody has waited for."""
    with contextlib.suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
