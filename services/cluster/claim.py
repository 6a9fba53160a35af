"""Who owns the stack of this machine: `owner.json` in the state directory.

The owner holds the file locked from its first moment to its last, so there is one owner at a time, and a record in an
unlocked file is of an owner that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from services.cluster import remains, state
from services.cluster.state import Owner, StackError

OWNER = "owner.json"


def current() -> Owner | None:
    """The owner of the stack of this machine, which may have been killed; None if there is no stack.

    Raises:
        StackError: the record is damaged.
    """
    try:
        return _parsed((state.directory() / OWNER).read_bytes())
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def claimed(owner: Owner) -> Iterator[None]:
    """Owns the stack of this machine. Ends first what an owner that was killed has left.

    Raises:
        StackError: another process owns it, or the record cannot be written.
    """
    with _locked() as descriptor:
        if descriptor is None:
            raise taken(current())
        _clean(descriptor)
        state.forget_why()
        with state.writing():
            os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
        try:
            yield
        finally:
            state.forget()
            os.ftruncate(descriptor, 0)


def clean() -> None:
    """Ends what owners that were killed have left. Does nothing to a stack that has an owner that lives."""
    with _locked() as descriptor:
        if descriptor is not None:
            _clean(descriptor)
    sweep()


def sweep() -> None:
    """Ends what is in no record: stacks whose owners were killed, and why the last one ended."""
    state.forget_why()
    with contextlib.suppress(OSError):
        clear_abandoned(remains.base())


def clear_abandoned(base: Path) -> list[Path]:
    """Ends stacks in `base` whose owners were killed, also those of `qaq demo`, which are in no record.

    Returns:
        their directories.
    """
    found = []
    for directory in base.glob(f"{remains.PREFIX}*"):
        with contextlib.suppress(OSError):
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(directory / OWNER, os.O_RDWR | os.O_NOFOLLOW)
            with contextlib.closing(os.fdopen(descriptor)):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_size:  # else its owner is about to lock it
                    remains.clear(directory)
                    found.append(directory)
    return found


@contextlib.contextmanager
def marked(owner: Owner) -> Iterator[None]:
    """Says in a stack's directory that it has an owner as long as the context lasts.

    By a lock: whoever shares the directory need not see the owner's process.
    """
    descriptor = os.open(owner.directory / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.closing(os.fdopen(descriptor)):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
        yield


def taken(owner: Owner | None) -> StackError:
    """That another stack runs, starts or stops."""
    running = state.load()
    who = f"process {owner.pid}" if owner else "another process"
    if running is None:
        return StackError(f"a stack is starting or stopping already ({who}); wait for it, or stop it with `qaq down`")
    return StackError(f"a stack is running already (router at {running.router}); stop it with `qaq down`")


@contextlib.contextmanager
def _locked() -> Iterator[int | None]:
    """The descriptor of the record, locked; None if another process has locked it."""
    with state.writing() as folder:
        descriptor = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _clean(descriptor: int) -> None:
    left = _parsed(os.pread(descriptor, 1 << 16, 0))
    if left is not None:
        remains.clear(left.directory)
    state.forget()
    os.ftruncate(descriptor, 0)


def _parsed(record: bytes) -> Owner | None:
    try:
        return Owner.model_validate_json(record) if record else None
    except ValueError as error:
        path = state.directory() / OWNER
        raise StackError(f"{path} is damaged; stop the process it names by hand and delete it") from error
