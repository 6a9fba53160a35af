"""Logs: one that cannot be written harms nobody, and clients that leave fill none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from services.common.log import _wanted

PROGRAM = """
import os, sys, structlog
from services.common import log
log.configure()
if sys.argv[1] == "closed":
    sys.stderr.close()
structlog.get_logger().warning("nobody reads this")
structlog.get_logger().error("nor this")
print("goes on")
"""


@pytest.mark.parametrize("how", ["broken", "closed"])
def test_a_log_that_nobody_reads_ends_nothing(how: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(program, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60, check=False)
    os.close(writer)
    assert done.stdout == "goes on\n"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("ExecuteBatchError raised in core by servicer method [/qaq.v1.Worker/Run]", False),
        ("Unexpected [KeyError] raised by servicer method [/qaq.v1.Worker/Run]", True),
    ],
)
def test_a_client_that_has_gone_away_is_no_error_of_a_server(said: str, wanted: bool) -> None:
    record = logging.LogRecord("grpc._cython.cygrpc", logging.ERROR, "", 0, said, None, None)
    assert _wanted(record) is wanted
