"""Models and tokenizers from a local directory, a GGUF file or the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from qaq_core.base.errors import ConfigError, ModelLoadError
from qaq_core.models.default_model import default_model_path
from qaq_core.models.gguf import Progress, check_gguf, converted_model, converted_tokenizer, quiet
from qaq_core.models.linear import LOSSLESS, pack

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

__all__ = ["Checkpoint", "LoadedModel", "default_model_path", "load_model", "load_tokenizer"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: in eval mode, on its device. tokenizer: as transformers makes it.
        fingerprint: hex; the same weights and configuration have the same one wherever they were found.
        context_length: tokens the model was made for.
        weights: form of its linear layers, one of `linear.WEIGHTS` but "auto".
    """

    model: Any
    tokenizer: Any
    name: str
    source: str
    fingerprint: str
    dtype: torch.dtype
    context_length: int
    weights: str = "plain"

    @property
    def identity(self) -> str:
        """Models with the same one make the same keys and values of the same tokens."""
        return self.fingerprint if self.weights in LOSSLESS else f"{self.fingerprint}/{self.weights}"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


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
    checkpoint = _find(source, with_weights=True, download=False)
    if checkpoint.is_gguf:
        check_gguf(checkpoint.path)
    return checkpoint


def load_tokenizer(source: str, progress: Progress | None = None) -> Any:
    """The tokenizer of a model; its weights are not read.

    Args:
        source: a local directory, a .gguf file or a hub id.
        progress: called with a stage and how much of it is done, 0 to 1.
    Raises:
        ModelLoadError: with what to do about it.
    """
    return _tokenizer(_find(source, with_weights=False), progress or _silent)


def load_model(
    source: str,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
    weights: str = "plain",
) -> LoadedModel:
    """A causal language model with its tokenizer.

    Args:
        source: a local directory, a .gguf file or a hub id.
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, elsewhere the checkpoint's own
            half precision or else bfloat16.
        progress: called with a stage and how much of it is done, 0 to 1.
        weights: form of the linear layers, see `linear.pack`.
    Raises:
        ModelLoadError: with what to do about it.
        ConfigError: unknown device, dtype or weights, or not for this machine.
    """
    progress = progress or _silent
    place = device_of(device)
    checkpoint = _find(source, with_weights=True)
    progress("reading", 0.0)
    fingerprint = checkpoint.fingerprint()
    progress("reading", 1.0)
    resolved = _dtype(dtype, place, checkpoint)
    directory = checkpoint.path
    if checkpoint.is_gguf:
        check_gguf(checkpoint.path)
        directory = converted_model(checkpoint.path, fingerprint, resolved, progress)
    tokenizer = _tokenizer(checkpoint, progress)
    progress("loading weights", 0.0)
    model = _weights(directory, resolved, place, source)
    weights = pack(model, weights)
    progress("loading weights", 1.0)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not context:
        raise ModelLoadError(f"{source} does not say how long its context is (max_position_embeddings)")
    return LoadedModel(model, tokenizer, checkpoint.name, source, fingerprint, resolved, int(context), weights)


def _find(source: str, with_weights: bool, download: bool = True) -> Checkpoint:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{source} is not a .gguf file; give one, or a directory with config.json")
        return Checkpoint(path.resolve(), path.stem)
    if source and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"{source} has no config.json; for a GGUF file, name the file")
        return Checkpoint(path.resolve(), path.resolve().name)
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1
    if looks_local or not _HUB_ID.fullmatch(source):
        raise ModelLoadError(
            f"{source!r} is not there; give a local directory, a .gguf file or a hub id such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return Checkpoint(_from_hub(source, with_weights, download), source)


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
            f"or give a local directory or a .gguf file ({_first_line(error)})"
        ) from error
    if not (Path(path) / "config.json").is_file():
        raise ModelLoadError(f"{hub_id} on the hub holds no model: it has no config.json")
    return Path(path)


def _tokenizer(checkpoint: Checkpoint, progress: Progress) -> Any:
    from transformers import AutoTokenizer

    directory = checkpoint.path
    if checkpoint.is_gguf:
        check_gguf(checkpoint.path)
        directory = converted_tokenizer(checkpoint.path, checkpoint.fingerprint(), progress)
    progress("loading tokenizer", 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise ModelLoadError(
            f"the tokenizer in {directory} cannot be loaded; download it again ({_first_line(error)})"
        ) from error
    progress("loading tokenizer", 1.0)
    return tokenizer


def _weights(directory: Path, dtype: torch.dtype, device: torch.device, source: str) -> Any:
    from transformers import AutoModelForCausalLM

    # Only off the CPU: there, a device map would copy what is better left memory-mapped.
    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **placement,
            )
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(f"{source} does not fit on {device}; take a smaller model") from error
    except Exception as error:
        raise ModelLoadError(
            f"{source} cannot be loaded from {directory}: {_first_line(error)}; "
            "it must be a causal language model with complete files (delete a damaged copy and load it again)"
        ) from error
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise ModelLoadError(
            f"{source} lacks {len(info['missing_keys'])} weights, among them {first}; download it again"
        )
    return model.eval()


def device_of(device: str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}; take cpu, cuda or cuda:N") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{device} is not there: torch sees {torch.cuda.device_count()} CUDA devices; take cpu")
    return place


def _dtype(name: str, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"unknown dtype {name!r}; take auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    own = None if checkpoint.is_gguf else _config(checkpoint.path)
    half = (own or {}).get("dtype") or (own or {}).get("torch_dtype")
    return torch.float16 if half == "float16" else torch.bfloat16


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise ModelLoadError(f"{directory}/config.json is damaged; download it again ({error})") from error
    return config if isinstance(config, dict) else {}


def _hash_file(path: Path) -> bytes:
    try:
        return blake3(max_threads=blake3.AUTO).update_mmap(path).digest()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _silent(stage: str, done: float) -> None:
    pass
