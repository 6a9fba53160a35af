"""Names of configurations, and what they stand for."""

from __future__ import annotations

import pytest

from qaq_core.base.errors import ConfigError
from qaq_eval.quality import Config


@pytest.mark.parametrize(
    "text",
    ["", "@2", "balanced@", "balanced@x", "balanced@2y", "balanced@-1", "paper[", "paper[]]", "balanced@e2x"],
)
def test_what_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no configuration"):
        Config.parse(text)


def test_targets() -> None:
    assert Config.parse("balanced@2.2").settings == {"target_bits": 2.2}
    assert Config.parse("paper@8x").settings == {"target_compression": 8.0}
    assert Config.parse("balanced@e0.01").settings == {"target_error": 0.01}
    assert Config.parse("balanced-norequant@3").settings == {"target_bits": 3.0, "exceptions": False}
    in_time = Config.parse("balanced-in-time@8x")
    assert (in_time.preset, in_time.settings) == ("balanced", {"target_compression": 8.0, "exceptions": "in-time"})


def test_settings() -> None:
    found = Config.parse("paper[attention_window=3, granularity=head, bits=(2, 6), exceptions=False]@4x")
    assert found.preset == "paper"
    assert found.settings == {
        "attention_window": 3,
        "granularity": "head",
        "bits": (2, 6),
        "exceptions": False,
        "target_compression": 4.0,
    }
    several = Config.parse_all(
        "paper[codec=normal,bits=(2, 6)], uniform-2,,paper[codec=normal,bits=(2, 6)],balanced@8x"
    )
    assert [config.text for config in several] == ["paper[codec=normal,bits=(2, 6)]", "uniform-2", "balanced@8x"]


@pytest.mark.parametrize("text", ["paper[3]", "paper[codec=]", "paper[codec=1+x]", "paper[**{}]", "paper[a=b.c]"])
def test_settings_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="are no settings"):
        Config.parse(text)


def test_originals_that_nothing_holds_so_are_refused() -> None:
    with pytest.raises(ConfigError, match="take exact, float16, int8"):
        Config.parse("balanced[originals=int4]@4x")
