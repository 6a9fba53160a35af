from __future__ import annotations

from pathlib import Path

import pytest

from qaq_core.base.errors import ConfigError
from qaq_eval.serving.arrivals import mix, read_trace


def test_a_mix_has_conversations_short_and_long_requests_and_repeats() -> None:
    scripts = mix(200, seed=1)
    assert sum(map(len, scripts)) == 200
    conversations = [script for script in scripts if len(script) > 1]
    assert 96 <= sum(map(len, conversations)) <= 102
    assert {script[0].shared for script in conversations} == {"system-0", "system-1"}
    for script in conversations:
        assert len({turn.session for turn in script}) == 1
        assert not any(turn.shared for turn in script[1:])
    assert len({script[0].session for script in conversations}) == len(conversations)
    lengths = [script[0].prompt_tokens for script in scripts if len(script) == 1]
    assert min(lengths) < 64
    assert max(lengths) > 512
    assert mix(200, seed=1) == scripts != mix(200, seed=2)


def test_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"at": 2, "session": "a", "prompt": "And then?", "new_tokens": 3}\n\n'
        '{"at": 0.5, "session": "a", "prompt_tokens": 7, "new_tokens": 5, "shared": "x", "shared_tokens": 9}\n'
        '{"new_tokens": 1, "prompt_tokens": 2}\n'
    )
    alone, session = read_trace(trace)
    assert [(turn.at, turn.prompt_tokens, turn.prompt) for turn in session] == [(0.5, 7, ""), (2, 0, "And then?")]
    assert (session[0].shared, session[0].shared_tokens) == ("x", 9)
    assert [arrival.at for arrival in alone] == [0]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": "x"}', "line 2: new_tokens: Field required"),
        ('{"new_tokens": 1}', "give either prompt or prompt_tokens"),
        ('{"new_tokens": 1, "prompt": "x", "prompt_tokens": 3}', "give either prompt or prompt_tokens"),
        ('{"new_tokens": 1, "prompt": "x", "at": -1}', "line 2: at: "),
        ('{"new_tokens": 1, "prompt": "x", "color": 1}', "line 2: color: "),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(f'{{"prompt_tokens": 1, "new_tokens": 1}}\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        read_trace(trace)
    assert sentence in str(caught.value)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="has no requests"):
        read_trace(tmp_path / "trace.jsonl")
