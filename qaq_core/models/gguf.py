"""GGUF files, converted once to the layout that loads quickly.

Parsing and dequantizing a GGUF file takes tens of seconds; the converted copy loads in less than one.
Copies live under `$QAQ_CACHE_DIR` (default `~/.cache/qaq`), named by the content of the file, and appear
by an atomic rename, so a reader never sees half of one. They may be deleted at any time.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from qaq_core.base.errors import ModelLoadError
from qaq_core.base.paths import cache_dir

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, float], None]

# Part of the copy's name: raise it when the conversion itself changes.
_LAYOUT = 1


def silent(stage: str, done: float) -> None:
    """A `Progress` that shows nothing."""


def check_gguf(path: Path) -> None:
    """Refuses a file that is no GGUF file or ends before its last tensor does.

    Raises:
        ModelLoadError
    """
    # transformers' public header class refuses types that its older loader, and gguf, can read (such as Q5_0).
    from gguf import GGML_QUANT_SIZES
    from transformers.integrations.gguf import reader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{path} is not a GGUF file; give a .gguf file or a directory with config.json")
    try:
        blob = reader._mapped(str(path))
        metadata, count, position = reader._read_metadata(blob, str(path))
        tensors, position = reader._read_tensor_table(blob, count, position)
        ends = [0]
        for _name, shape, kind, offset in tensors:
            numbers, block = GGML_QUANT_SIZES[kind]
            ends.append(offset + math.prod(shape) // numbers * block)
    except KeyError as error:
        raise ModelLoadError(f"{path} holds tensors of type {error}, which is not known here") from error
    except (ValueError, struct.error, IndexError, MemoryError) as error:
        raise ModelLoadError(f"{path} is truncated or damaged; download it again ({error})") from error
    alignment = metadata.get("general.alignment", 32)
    end = -(-position // alignment) * alignment + max(ends)
    size = path.stat().st_size
    if size < end:
        raise ModelLoadError(f"{path} is truncated: {size} bytes of {end}; download it again")


def converted_tokenizer(path: Path, fingerprint: str, progress: Progress) -> Path:
    """Directory with the tokenizer of a GGUF file; no weight is read."""

    def convert(target: Path) -> None:
        from transformers.utils import is_torch_available

        progress("converting tokenizer", 0.0)
        (_convert_tokenizer if is_torch_available() else _convert_in_child)(path, target)
        progress("converting tokenizer", 1.0)

    return _once(path, fingerprint, "tokenizer", convert)


def _convert_tokenizer(path: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    check_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    # Loading hints, not properties of the tokenizer.
    for hint in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(hint, None)
    tokenizer.save_pretrained(target)


def _convert_in_child(path: Path, target: Path) -> None:
    """For a process that avoids torch, which the conversion imports."""
    child = subprocess.run(
        [sys.executable, "-m", __name__, path, target],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        reason = child.stderr.strip() or f"the conversion ended with code {child.returncode}"
        raise ModelLoadError(reason.splitlines()[-1])


def converted_model(path: Path, fingerprint: str, dtype: torch.dtype, progress: Progress) -> Path:
    """Directory with the configuration and weights of a GGUF file, dequantized to `dtype`."""

    def convert(target: Path) -> None:
        from transformers import AutoModelForCausalLM

        check_gguf(path)
        progress("converting weights", 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
        )
        # Left in place, these would make the copy claim to be quantized still.
        model.hf_quantizer = None
        for name in ("quantization_config", "_model_name_or_path"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        progress("converting weights", 0.8)
        model.save_pretrained(target)
        progress("converting weights", 1.0)

    return _once(path, fingerprint, f"model-{str(dtype).removeprefix('torch.')}", convert)


def _once(source: Path, fingerprint: str, name: str, convert: Callable[[Path], None]) -> Path:
    """The directory `name` of this file's copy; `convert` fills it if no process has done so yet."""
    home = cache_dir() / "models" / f"{fingerprint[:32]}-{_LAYOUT}"
    done = home / name
    if done.is_dir():
        return done
    try:
        home.mkdir(parents=True, exist_ok=True)
        # The system lets go of the lock when its holder dies, so whatever unfinished copy is found was abandoned.
        with FileLock(home / f"{name}.lock"):
            if done.is_dir():
                return done
            for abandoned in home.glob(f".{name}-*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
            try:
                with quiet(), _parsed_once():
                    convert(unfinished)
                unfinished.rename(done)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(
            f"{source} cannot be converted under {home} ({error}); free some space there or set QAQ_CACHE_DIR"
        ) from error
    except Exception as error:
        check_gguf(source)
        raise ModelLoadError(f"{source} cannot be loaded: {error}") from error
    return done


_parsing = threading.Lock()


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Makes transformers' GGUF loader parse a file once and build each name map once.

    As it comes, it parses the file anew for the tokenizer, the configuration and the weights, and builds
    the map of tensor names for each of the model's modules: measured, two thirds of the whole conversion.
    """
    import gguf

    def remembered(name: str) -> Any:
        return functools.lru_cache(maxsize=4)(getattr(gguf, name))

    names = ("GGUFReader", "get_tensor_name_map")
    with _parsing:
        before = {name: getattr(gguf, name) for name in names}
        try:
            for name in names:
                setattr(gguf, name, remembered(name))
            yield
        finally:
            for name, value in before.items():
                setattr(gguf, name, value)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own progress bars off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _child(path: Path, target: Path) -> None:
    try:
        with _parsed_once():
            _convert_tokenizer(path, target)
    except ModelLoadError as error:
        sys.exit(str(error))
    except Exception as error:
        sys.exit(f"{path} cannot be loaded: {error}")


if __name__ == "__main__":  # started by _convert_in_child
    _child(*map(Path, sys.argv[1:]))
