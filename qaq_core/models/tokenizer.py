"""The tokenizer of a model, also in a process that never imports torch."""

from __future__ import annotations

import os
import sys
from typing import Any

from qaq_core.base.errors import ModelLoadError
from qaq_core.models.checkpoint import Checkpoint, first_line, locate
from qaq_core.models.gguf import Progress, converted_tokenizer, silent

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.model")
"""What a tokenizer may be read from."""


def load_tokenizer(source: str, progress: Progress | None = None) -> Any:
    """The tokenizer of a model; its weights are not read.

    Args:
        source: a local directory, a .gguf file or a hub id.
        progress: called with a stage and how much of it is done, 0 to 1.
    Raises:
        ModelLoadError: with what to do about it.
    """
    return tokenizer_of(locate(source, with_weights=False), progress or silent)


def tokenizer_of(checkpoint: Checkpoint, progress: Progress) -> Any:
    """As `load_tokenizer`, of files that were found."""
    from transformers import AutoTokenizer

    directory = checkpoint.path
    if checkpoint.is_gguf:
        directory = converted_tokenizer(checkpoint.path, checkpoint.fingerprint(), progress)
    progress("loading tokenizer", 0.0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        if not any(found for kind in _FILES for found in directory.glob(kind)):
            raise ModelLoadError(
                f"there is no tokenizer in {directory}; put the model's tokenizer.json and tokenizer_config.json there"
            ) from error
        raise ModelLoadError(
            f"the tokenizer in {directory} cannot be loaded; download it again ({first_line(error)})"
        ) from error
    progress("loading tokenizer", 1.0)
    return tokenizer


def avoid_torch() -> None:
    """Makes transformers load its tokenizers without torch, which takes several hundred MB and seconds to import.

    For a process that runs no model: afterwards transformers refuses to load one. Does nothing if torch or
    transformers has been imported already.
    """
    if not sys.modules.keys().isdisjoint({"torch", "transformers"}):
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's mark of a module that is not there
    try:
        # transformers looks for torch now, and remembers the answer.
        from transformers import AutoTokenizer  # noqa: F401
    finally:
        del sys.modules["torch"]
