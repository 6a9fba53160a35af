from __future__ import annotations

from typing import Any

import pytest
from qaq.v1.common_pb2 import TokenInfo

from services.gateway import logprobs
from services.gateway.logprobs import CompletionLogprobs


def token(place: int, raw: bytes | str, **fields: Any) -> TokenInfo:
    raw = raw.encode() if isinstance(raw, str) else raw
    fields = {"logprob": -1.0} | fields
    return TokenInfo(token_id=place, bytes=raw, text=raw.decode(errors="replace"), **fields)


PARTS = [token(1, b" \xe2"), token(2, b"\x82"), token(3, b"\xac"), token(4, " x")]
END = token(9, "<|im_end|>", special=True)


def test_parts_of_a_character_join_to_it() -> None:
    told = logprobs.chat(PARTS)
    assert told is not None
    assert bytes(byte for part in told["content"] for byte in part["bytes"]).decode() == " € x"
    of = CompletionLogprobs([], "", 0).of([*PARTS, END], length=4)
    assert of is not None
    assert of["tokens"] == ["bytes:\\x20\\xe2", "bytes:\\x82", "bytes:\\xac", " x", "<|im_end|>"]
    assert of["text_offset"] == [0, 1, 1, 2, 4]


def test_offsets_over_several_chunks() -> None:
    """A token comes with its text: a part of a character with the whole one, one without text with what follows."""
    stream = CompletionLogprobs([], "", 0)
    chunks = zip((*PARTS, END, token(5, "y")), (1, 1, 2, 4, 4, 5), strict=True)
    told = [stream.of([info], length, ended=False) for info, length in chunks]
    assert [part["text_offset"] if part else [] for part in told] == [[0], [], [1, 1], [2], [], [4, 4]]
    assert stream.of([], 5) is None


@pytest.mark.parametrize("includes_stop", [False, True])
def test_a_streamed_offset_never_runs_past_the_text(includes_stop: bool) -> None:
    """What may be a stop string is held back: where its tokens begin is known when it is one, or is none."""
    stream = CompletionLogprobs([], "", 0)
    held = [stream.of([token(1, "One")], 3, False), stream.of([token(2, " two")], 4, False)]
    held += [stream.of([token(3, " th")], 4, False), stream.of([token(4, "ree")], 4, False)]
    assert [part["text_offset"] if part else [] for part in held] == [[0], [3], [], []]
    last = stream.of([], 13 if includes_stop else 4, ended=True)
    assert last is not None
    assert last["tokens"] == [" th", "ree"]
    assert last["text_offset"] == ([7, 10] if includes_stop else [4, 4])


def test_offsets_never_run_past_the_text() -> None:
    """The text ends before a stop string, whose tokens are told."""
    of = CompletionLogprobs([], "", 0).of([token(1, "One"), token(2, " two"), token(3, " three")], length=5)
    assert of is not None
    assert of["text_offset"] == [0, 3, 5]


def test_offsets_of_an_echoed_prompt() -> None:
    first = TokenInfo(token_id=0, bytes=b"<s>", text="<s>", special=True)
    prompt = [first, token(1, " The"), token(2, " end")]
    of = CompletionLogprobs(prompt, "The end", 0).of([token(3, "."), END], length=8)
    assert of is not None
    assert of["text_offset"] == [0, 0, 3, 7, 8]
    assert of["token_logprobs"][0] is of["top_logprobs"][0] is None
    own = CompletionLogprobs(prompt, logprobs.text_of(prompt), 0).of([], 7)
    assert own is not None
    assert own["text_offset"] == [0, 3, 7]


def test_the_sampled_token_is_among_the_alternatives() -> None:
    def alternatives(top: int, *near: TokenInfo) -> dict[str, float]:
        sampled = token(7, " c", logprob=-3.0, top=near)
        of = CompletionLogprobs([], "", top).of([sampled], 2)
        assert of is not None
        return of["top_logprobs"][0]

    best = [token(1, " a", logprob=-0.5), token(2, " b", logprob=-1.0)]
    assert alternatives(0) == {" c": -3.0}
    assert alternatives(2, *best) == {" a": -0.5, " b": -1.0, " c": -3.0}
    assert alternatives(1, token(7, " c", logprob=-3.0)) == {" c": -3.0}
    same = [token(5, b"\xe2", logprob=-0.5), token(6, b"\xf0", logprob=-1.0), token(8, " c", logprob=-1.5)]
    assert alternatives(3, *same) == {"bytes:\\xe2": -0.5, "bytes:\\xf0": -1.0, "token_id:8": -1.5, " c": -3.0}


def test_prompts_in_vllms_form() -> None:
    near = [token(1, " a", logprob=-0.5), token(2, " b", logprob=-1.0), token(3, " c", logprob=-2.0)]
    told = logprobs.prompt([TokenInfo(token_id=4), token(9, "x", logprob=-float("inf"), rank=40, top=near)], 2)
    assert told == [
        None,
        {
            "9": {"logprob": -9999.0, "rank": 40, "decoded_token": "x"},
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": " a"},
            "2": {"logprob": -1.0, "rank": 2, "decoded_token": " b"},
        },
    ]


def test_offsets_after_bytes_that_no_other_completes() -> None:
    raw = [b"\xe2", b"\x0c", b"\xe2", b"\xe2\x82", b"\xff", b"\xe2\x82", b"\xac", b"a"]
    tokens = [token(place, part) for place, part in enumerate(raw)]
    text = logprobs.text_of(tokens)
    expected = [0, 1, 2, 3, 4, 5, 5, 6]
    assert [text[at] for at in expected] == ["\ufffd", "\x0c", "\ufffd", "\ufffd", "\ufffd", "€", "€", "a"]
    size = len(text)
    for told in (CompletionLogprobs([], "", 0).of(tokens, size), CompletionLogprobs(tokens, text, 0).of([], size)):
        assert told is not None
        assert told["text_offset"] == expected
