"""What of a model decides the size of its cache: from a table of well-known models, or from a config.json."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qaq_core.base.errors import ConfigError

_TABLE = Path(__file__).with_name("models.json")


@dataclass(frozen=True)
class ModelSize:
    """The attention of a decoder.

    Attributes:
        sliding_layers: those of `layers` that see the last `window` tokens alone.
        parameters: of the whole model; None if the configuration does not tell.
        source: where the numbers are from.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    sliding_layers: int = 0
    window: int = 0
    parameters: float | None = None
    source: str = ""

    @property
    def elements(self) -> int:
        """Numbers of a token's keys and values in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def held_elements(self, context: int) -> int:
        """Numbers that a cache holds which drops what has left a sliding window."""
        layer = 2 * self.kv_heads * self.head_dim
        short = min(context, self.window) if self.sliding_layers else 0
        return layer * ((self.layers - self.sliding_layers) * context + self.sliding_layers * short)


def known_models() -> list[ModelSize]:
    """The models of the table."""
    return [ModelSize(**row) for row in json.loads(_TABLE.read_text("utf-8"))]


def model_size(model: str) -> ModelSize:
    """A model by its name in the table, or by its config.json or the directory of it.

    Raises:
        ConfigError: there is none, or it is none that a cache of keys and values can be computed for.
    """
    path = Path(model)
    if model and (path.is_dir() or path.suffix == ".json"):
        return _of_file(path / "config.json" if path.is_dir() else path)
    wanted = _plain(model)
    found = [one for one in known_models() if _plain(one.name) == wanted]
    found = found or [one for one in known_models() if wanted and wanted.startswith(_plain(one.name))]
    if not found:
        names = ", ".join(one.name for one in known_models())
        raise ConfigError(f"{model!r} is no model of the table and no config.json; give a path, or one of {names}")
    return found[0]


def _plain(name: str) -> str:
    """ "qwen38b" of "Qwen/Qwen3-8B"."""
    return re.sub(r"[^a-z0-9.]", "", name.rpartition("/")[2].lower())


def _of_file(path: Path) -> ModelSize:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as a model's config.json ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no model's config.json: it holds no object")
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise ConfigError(f"{path} is no model's config.json: its text_config is no object")
    if text.get("kv_lora_rank"):
        raise ConfigError(f"{path} is of a model that stores latent keys and values, which QAQ does not serve")
    layers, heads, hidden = (
        _number(path, text, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    head_dim = _number(path, text, "head_dim", hidden // heads)
    kv_heads = _number(path, text, "num_key_value_heads", heads)
    sliding, window = _sliding(path, text, layers)
    return ModelSize(
        path.parent.resolve().name,
        layers,
        kv_heads,
        head_dim,
        sliding,
        window,
        _parameters(text, layers, hidden, heads * head_dim, kv_heads * head_dim),
        str(path),
    )


def _number(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key) or default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path} has {key} = {value!r}, which must be a positive integer")
    return value


def _sliding(path: Path, config: dict[str, Any], layers: int) -> tuple[int, int]:
    """How many layers have a sliding window, and its tokens."""
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return 0, 0
    window = _number(path, config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise ConfigError(f"{path} has layer_types = {kinds!r}, which must be a list")
    if kinds:
        return sum(kind == "sliding_attention" for kind in kinds), window
    if "sliding_window_pattern" in config:
        return layers - layers // _number(path, config, "sliding_window_pattern"), window
    if config.get("model_type") == "gemma3_text":  # older configurations leave its default of one in six out
        return layers - layers // 6, window
    full = _number(path, config, "max_window_layers") if config.get("max_window_layers") else 0
    return layers - min(layers, full), window


def _parameters(config: dict[str, Any], layers: int, hidden: int, queries: int, keys: int) -> float | None:
    """Of embeddings, attention and gated feed-forward layers; None where that is not all there is."""
    inner, words = config.get("intermediate_size"), config.get("vocab_size")
    if not isinstance(inner, int) or not isinstance(words, int) or any("expert" in key for key in config):
        return None
    tables = 1 if config.get("tie_word_embeddings", True) else 2
    return float(tables * words * hidden + layers * hidden * (2 * queries + 2 * keys + 3 * inner))
