"""Runs a command that takes --json and records what it wrote: python tools/measure.py OUT.json qaq bench decode ...

OUT.json then has the machine, the commit, the date, the load average before the run, the command, and its result.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_INFO = Path("/proc/cpuinfo")


def machine() -> str:
    """Processor, cores, memory and the widest vector instructions that the kernels use."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    first = dict(line.split("\t", 1) for line in text.partition("\n\n")[0].splitlines() if "\t" in line)
    facts = {name: value.strip("\t: ") for name, value in first.items()}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flags = facts.get("flags", "").split()
    vectors = [", AVX-512"] if "avx512_vnni" in flags else [", AVX2"] if "avx2" in flags else []
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB{''.join(vectors)}"


def commit() -> str:
    """The commit that is checked out, with "-dirty" if tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def shown(command: list[str]) -> str:
    """The command without folders of this machine."""
    return " ".join(Path(word).name if word.startswith(("/", ".venv/")) else word for word in command)


def measure(out: Path, command: list[str]) -> None:
    """Writes `out`. An evaluation that was stopped finds its finished parts beside the raw file.

    Raises:
        subprocess.CalledProcessError: the command failed; nothing is recorded.
    """
    raw = out.with_suffix(".raw.json")
    facts: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        "command": shown(command),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, "--json", str(raw)], check=True)
    facts["result"] = json.loads(raw.read_text(encoding="utf-8"))
    out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    raw.unlink()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    measure(Path(sys.argv[1]), sys.argv[2:])
