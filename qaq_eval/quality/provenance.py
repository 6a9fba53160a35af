"""Where figures come from: command, machine, versions, date."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("qaq-kv", "torch", "transformers")


def provenance(arguments: list[str] | None = None) -> dict[str, str]:
    """Facts of this process; the command is without folders of this machine.

    Args:
        arguments: of the command; this process's if not given.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return {
        "command": shlex.join(["qaq", *(Path(word).name if word.startswith("/") else word for word in words)]),
        "machine": machine(),
        "versions": ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))),
        "date": datetime.date.today().isoformat(),
    }


def machine() -> str:
    """Processor, cores and the widest vector instructions that the kernels use."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    facts = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    flags = known.get("flags", "").split()
    vectors = ", AVX-512" if "avx512_vnni" in flags else ", AVX2" if "avx2" in flags else ""
    return f"{known.get('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores{vectors}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
