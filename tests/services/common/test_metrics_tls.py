"""Metrics over TLS, for those who show a certificate."""

from __future__ import annotations

import ssl
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest

from services.common import metrics
from services.common.certificates import files, issue
from services.common.embedded_redis import free_port
from services.common.identity import Identity


def read(port: int, context: ssl.SSLContext) -> str:
    with urllib.request.urlopen(f"https://localhost:{port}/metrics", timeout=10, context=context) as answer:
        return str(answer.read().decode())


def test_metrics_ask_for_a_certificate(tmp_path: Path) -> None:
    issue(tmp_path)
    port = free_port()
    metrics.serve(port, identity=Identity(*files(tmp_path, "router")))
    context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    with pytest.raises((URLError, OSError)):
        read(port, context)
    context.load_cert_chain(*files(tmp_path, "operator")[1:])
    assert "qaq_sessions" in read(port, context)
    issue(tmp_path)
    assert "qaq_sessions" in read(port, context)
