"""Generates the Python code of the protocol beside its .proto files.

`python tools/gen_proto.py` writes it; `--check` compares with what is checked in and exits 1 on drift.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(out: Path) -> None:
    """Writes *_pb2.py, *_pb2.pyi and *_pb2_grpc.py of every .proto below PROTO into `out`."""
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    status = protoc.main(["protoc", f"--proto_path={PROTO}", f"--proto_path={well_known}", *outputs, *sources])
    if status != 0:
        raise SystemExit(status)


def generated_files(root: Path) -> dict[Path, bytes]:
    """Generated code below `root`, by relative path."""
    paths = (path for pattern in GENERATED for path in root.rglob(pattern))
    return {path.relative_to(root): path.read_bytes() for path in paths}


def drift() -> list[str]:
    """One line for each generated file that is missing, stale or no longer made."""
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        fresh = generated_files(Path(temporary))
    present = generated_files(PROTO)
    lines = [f"missing: {path}" for path in fresh.keys() - present.keys()]
    lines += [f"no longer generated: {path}" for path in present.keys() - fresh.keys()]
    lines += [f"differs: {path}" for path in fresh.keys() & present.keys() if fresh[path] != present[path]]
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on drift")
    if not parser.parse_args().check:
        generate(PROTO)
        return 0
    lines = drift()
    for line in lines:
        print(line)
    if lines:
        print("run: python tools/gen_proto.py")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
