"""Who owns the stack of this machine: `owner.json` in the state directory.

The owner holds the file locked from its first moment to its last, so there is one owner at a time, and a record in an
unlocked file is of an owner that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from services.cluster import remains, state
from services.cluster.state import Owner, StackError


def current() -> Owner | None:
    """The owner of the stack of this machine, which may have been killed; None if there is no stack.

    Raises:
        StackError: the record is damaged.
    """
    try:
        return _parsed((state.directory() / "owner.json").read_bytes())
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
        with state.writing():
            os.pwrite(descriptor, owner.model_dump_json().encode(), 0)
        try:
            yield
        finally:
            state.forget()
            os.ftruncate(descriptor, 0)


def clean() -> None:
    """Ends what an owner that was killed has left. Does nothing if the stack has an owner that lives."""
    with _locked() as descriptor:
        if descriptor is not None:
            _clean(descriptor)


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
        descriptor = os.open(folder / "owner.json", os.O_RDWR | os.O_CREAT, 0o600)
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
        path = state.directory() / "owner.json"
        raise StackError(f"{path} is damaged; stop the process it names by hand and delete it") from error
