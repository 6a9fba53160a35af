"""Configurations by name: a preset or a baseline, its settings, and a target."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

import qaq_eval.baselines  # noqa: F401  (registers them as presets)
from qaq_core import Method, make_method
from qaq_core.base.errors import ConfigError
from qaq_core.storage import HeldValues, check_held_values

_CONFIG = re.compile(
    r"(?P<name>[^@\[\]]+)(\[(?P<settings>[^\[\]]*)\])?(@(?P<error>e)?(?P<number>\d+(\.\d+)?)(?P<times>x)?)?"
)
_EXCEPTIONS = {"-norequant": False, "-in-time": "in-time"}
"""By the end of a configuration's name: the preset's setting `exceptions`."""


@dataclass(frozen=True)
class Config:
    """One configuration: a preset or baseline, `-norequant` or `-in-time` for exceptions, settings, and a target.

    `balanced@2.2` has 2.2 code bits per element after the prompt, `balanced@8x` is 8 times smaller than fp16,
    `balanced@e0.01` has a predicted KL divergence of 0.01 nats per token. `paper[attention_window=3]` has a setting of
    the preset. `balanced[originals=int8]` re-quantizes from originals that are held so.
    """

    text: str
    preset: str
    settings: dict[str, Any]
    originals: HeldValues = "exact"

    @classmethod
    def parse(cls, text: str) -> Config:
        match = _CONFIG.fullmatch(text)
        if match is None or (match["error"] and match["times"]):
            raise ConfigError(
                f"{text!r} is no configuration: write a preset or baseline, and a target after @, "
                "as in balanced@2.2 (bits), balanced@8x (times smaller) or balanced@e0.01 (nats), "
                "and settings in brackets: paper[attention_window=3]@4x"
            )
        settings = _settings(match["settings"] or "")
        if match["number"]:
            kind = "error" if match["error"] else "compression" if match["times"] else "bits"
            settings[f"target_{kind}"] = float(match["number"])
        name = match["name"]
        for end, exceptions in _EXCEPTIONS.items():
            if name.endswith(end):
                name, settings["exceptions"] = name.removesuffix(end), exceptions
        return cls(text, name, settings, check_held_values(settings.pop("originals", "exact")))

    @classmethod
    def parse_all(cls, text: str) -> list[Config]:
        """Configurations separated by commas, each once."""
        names = (name.strip() for name in re.split(r",(?![^\[]*\])", text))
        return [cls.parse(name) for name in dict.fromkeys(names) if name]

    def method(self, model: Any, fingerprint: str | None) -> Method:
        """The configuration's method. Switches the model to QAQ's attention."""
        return make_method(model, fingerprint, self.preset, **self.settings)


def _settings(text: str) -> dict[str, Any]:
    """Settings written as keyword arguments, words without quotes: `granularity=head, bits=(2, 6)`."""
    try:
        call = ast.parse(f"settings({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or None in {setting.arg for setting in call.keywords}:
            raise ValueError("every setting needs its name")
        return {
            str(setting.arg): setting.value.id
            if isinstance(setting.value, ast.Name)
            else ast.literal_eval(setting.value)
            for setting in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"[{text}] are no settings ({error}): write them as in [granularity=head]") from error
