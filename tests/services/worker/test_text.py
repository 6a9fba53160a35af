"""Text comes in whole characters, never shows a stop string, and loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaq_core.base.errors import UnsupportedModelError
from qaq_core.models import LoadedModel
from services.worker.text import TextStream, tokenizer_backend


def pieces(smollm2: LoadedModel, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(smollm2.tokenizer.backend_tokenizer, smollm2.tokenizer.encode("Before"), stop)
    parts = [stream.push(token) for token in tokens]
    return [*parts, stream.finish()], stream


def test_text_is_whole(smollm2: LoadedModel) -> None:
    text = " Grüße 🙂🙃, 世界! \N{FAMILY}\n\tif x:  return\u00a0y"
    parts, _ = pieces(smollm2, smollm2.tokenizer.encode(text))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert len([part for part in parts if part]) > 8


def test_half_a_character_waits_and_is_shown_at_the_end(smollm2: LoadedModel) -> None:
    first, second = smollm2.tokenizer.encode("🙂")
    parts, _ = pieces(smollm2, [first, second, first])
    assert parts[:3] == ["", "🙂", ""]
    assert set(parts[3]) == {"\ufffd"}


def test_a_cut_character_is_no_stop_string(smollm2: LoadedModel) -> None:
    """It would end the text as if the model had written what stands for the missing part."""
    text = smollm2.tokenizer.encode("a🙂")
    for stop in ("\ufffd", "a\ufffd"):
        parts, stream = pieces(smollm2, text[:-1], (stop,))
        assert "".join(parts).rstrip("\ufffd") == "a"
        assert parts[-1].endswith("\ufffd")
        assert stream.stop_found is None
    parts, stream = pieces(smollm2, [*text[:-1], *smollm2.tokenizer.encode("b")], ("\ufffd",))
    assert ("".join(parts), stream.stop_found) == ("a", "\ufffd")  # of a character that nothing completes
    parts, stream = pieces(smollm2, text[:-1], ("a",))
    assert ("".join(parts), stream.stop_found) == ("", "a")


def test_special_tokens_have_no_text(smollm2: LoadedModel) -> None:
    tokens = smollm2.tokenizer.encode("Yes<|im_end|>")
    assert tokens[-1] == 2
    assert "".join(pieces(smollm2, tokens)[0]) == "Yes"


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("o", "one two"), ""),
        ("one two three", ("four",), "one two three"),
        ("one two thr", ("three",), "one two thr"),
        ("ababac", ("abac",), "ab"),
        ("line\n\nUser: hi", ("\n\nUser:",), "line"),
        ("a 🙂 b", ("🙂",), "a "),
    ],
)
def test_stop_strings(smollm2: LoadedModel, text: str, stop: tuple[str, ...], shown: str) -> None:
    parts, stream = pieces(smollm2, smollm2.tokenizer.encode(text), stop)
    assert "".join(parts) == shown
    assert (stream.stop_found is not None) is (shown != text)
    assert stream.stop_found is None or (stream.stop_found in stop and text.startswith(shown + stream.stop_found))


def test_what_may_be_a_stop_string_is_held_back(smollm2: LoadedModel) -> None:
    stream = TextStream(smollm2.tokenizer.backend_tokenizer, [], ("two three",))
    shown = ""
    for token in smollm2.tokenizer.encode("one two four"):
        shown += stream.push(token)
        assert not shown.endswith("two")
    assert shown + stream.finish() == "one two four"


def test_nothing_comes_after_a_stop(smollm2: LoadedModel) -> None:
    parts, stream = pieces(smollm2, smollm2.tokenizer.encode("a stop b c d"), ("stop",))
    assert "".join(parts) == "a "
    assert stream.push(smollm2.tokenizer.encode(" more")[0]) == ""
    assert stream.finish() == ""


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n🙂é", max_size=30), st.lists(st.text("ab 🙂", min_size=1, max_size=4), max_size=3))
def test_any_text_and_any_stop(smollm2: LoadedModel, text: str, stop: list[str]) -> None:
    tokens = smollm2.tokenizer.encode(text)
    decoded = smollm2.tokenizer.decode(tokens)
    first = min((at for at in map(decoded.find, stop) if at >= 0), default=None)
    parts, stream = pieces(smollm2, tokens, tuple(stop))
    shown = "".join(parts)
    assert (stream.stop_found is None) is (first is None)
    if first is None:
        assert shown == decoded
    else:
        # A piece with two stop strings ends at the first of them; a shorter one may be complete before it.
        assert decoded.startswith(shown)
        assert not any(s in shown for s in stop)


def test_a_tokenizer_without_a_backend_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        tokenizer_backend(object())
