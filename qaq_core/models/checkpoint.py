"""The files of a model: a local directory, a GGUF file, or a copy from the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from qaq_core.base.errors import ModelLoadError
from qaq_core.models.gguf import check_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class Checkpoint:
    """Files of a model on this machine: a directory with config.json, or a GGUF file."""

    path: Path
    name: str

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    def fingerprint(self) -> str:
        """Hex BLAKE3 of the weights and the configuration."""
        if self.is_gguf:
            return _hash_file(self.path).hex()
        weights = sorted(self.path.glob("*.safetensors"))
        if not weights:
            raise ModelLoadError(f"{self.path} has no .safetensors file; convert the weights with save_pretrained")
        digest = blake3()
        for file in (self.path / "config.json", *weights):
            digest.update(_hash_file(file))
        return digest.hexdigest()


def find_checkpoint(source: str) -> Checkpoint:
    """The files of a model that are on this machine; nothing is downloaded.

    Raises:
        ModelLoadError: they are not here, or not all of them.
    """
    checkpoint = locate(source, with_weights=True, download=False)
    if checkpoint.is_gguf:
        check_gguf(checkpoint.path)
    return checkpoint


def is_hub_id(source: str) -> bool:
    """Whether a model's source would be looked for on the hub: it is not on this machine, and does not look like it."""
    return not source.endswith(".gguf") and bool(_HUB_ID.fullmatch(source)) and not Path(source).exists()


def name_of(source: str) -> str:
    """The name of the model of a source, whether its files are here or not."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    if path.is_dir():
        return path.resolve().name
    return source if is_hub_id(source) else path.name


def locate(source: str, *, with_weights: bool, download: bool = True) -> Checkpoint:
    """The files of a model, downloaded if the source is a hub id.

    Args:
        source: a local directory, a .gguf file or a hub id.
        with_weights: False: a download leaves the weights out.
    Raises:
        ModelLoadError: with what to do about it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{source} is not a .gguf file; give one, or a directory with config.json")
        return Checkpoint(path.resolve(), name_of(source))
    if source and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{source} has no config.json; for a GGUF file, name the file")
        return Checkpoint(path.resolve(), name_of(source))
    if not is_hub_id(source):
        raise ModelLoadError(
            f"{source!r} is not there; give a local directory, a .gguf file or a hub id such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return Checkpoint(_from_hub(source, with_weights, download), name_of(source))


def _from_hub(hub_id: str, with_weights: bool, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_TEXT_FILES, "*.safetensors"] if with_weights else _TEXT_FILES
    try:
        path = snapshot_download(
            hub_id,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            etag_timeout=_HUB_TIMEOUT_S,
            local_files_only=not download,
        )
    except Exception as error:
        raise ModelLoadError(
            f"{hub_id} cannot be had from the hub and is not cached here; check the name and the network, "
            f"or give a local directory or a .gguf file ({first_line(error)})"
        ) from error
    if not (Path(path) / "config.json").is_file():
        raise ModelLoadError(f"{hub_id} on the hub holds no model: it has no config.json")
    return Path(path)


def _hash_file(path: Path) -> bytes:
    try:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error


def first_line(error: Exception) -> str:
    """The beginning of an error's message, for a message that quotes it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
