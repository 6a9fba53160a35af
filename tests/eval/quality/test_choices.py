"""Multiple choice: likelihoods from a cache that was quantized after the question."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.quality import Config
from qaq_eval.quality.choices import FULL_PRECISION, ChoiceEvaluator, Question
from qaq_eval.quality.journal import Journal
from qaq_eval.quality.tasks import read_questions, run_task
from tests.core.tiny_models import tiny, token_ids

KIND = "llama-gqa"
CONFIGS = ("fp16", "uniform-2", "h2o@4x")
PROMPTS, LENGTHS = 3, ((5, 9, 1), (4, 4, 4), (7, 2, 3))


def examiner(journal: Journal | None = None, window: int | None = None, configs: Any = CONFIGS) -> ChoiceEvaluator:
    parsed = [Config.parse(text) for text in configs]
    return ChoiceEvaluator(tiny(KIND), "tiny", parsed, window, journal or Journal("run", None))


def questions() -> list[Question]:
    made = []
    for i in range(PROMPTS):
        answers = tuple(tuple(token_ids(n, seed=10 * i + n)[0].tolist()) for n in LENGTHS[i])
        made.append(Question(tuple(token_ids(60 + 30 * i, seed=i)[0].tolist()), answers))
    return made


def nothing(share: float) -> None:
    pass


def test_full_precision_is_the_models_own() -> None:
    answered = examiner().answer(questions(), nothing)
    model = tiny(KIND)
    for question, said in zip(questions(), answered[FULL_PRECISION], strict=True):
        for answer, likelihood, greedy in zip(question.answers, said.log_likelihoods, said.greedy, strict=True):
            ids = torch.tensor([[*question.prompt, *answer]])
            with torch.no_grad():
                row = model(ids).logits[0, len(question.prompt) - 1 : -1].log_softmax(-1)
            expected = row.gather(1, torch.tensor(answer)[:, None])
            assert likelihood == pytest.approx(float(expected.sum()), abs=1e-3)
            assert greedy == (row.argmax(-1).tolist() == list(answer))


def test_half_precision_answers_alike_and_two_bits_do_not() -> None:
    answered = examiner().answer(questions(), nothing)
    for full, exact, coarse in zip(answered[FULL_PRECISION], answered["fp16"], answered["uniform-2"], strict=True):
        assert exact.log_likelihoods == pytest.approx(full.log_likelihoods, abs=2e-2)
        far = [abs(a - b) for a, b in zip(coarse.log_likelihoods, full.log_likelihoods, strict=True)]
        # The answer of one token too: its only prediction is made from the quantized prompt.
        assert min(far) > 1e-3
        assert exact.tokens == full.tokens
        assert exact.resident_bytes > coarse.resident_bytes > 0


def test_answers_do_not_depend_on_company() -> None:
    together = examiner().answer(questions(), nothing)
    for i, question in enumerate(questions()):
        alone = examiner().answer([question], nothing)
        for config in CONFIGS:
            expected = together[config][i].log_likelihoods
            assert alone[config][0].log_likelihoods == pytest.approx(expected, abs=1e-3)
            assert alone[config][0].resident_bytes == together[config][i].resident_bytes


def test_a_smaller_window_leaves_more_to_quantize() -> None:
    wide, narrow = (examiner(window=window).answer(questions(), nothing)["uniform-2"] for window in (None, 2))
    for a, b in zip(wide, narrow, strict=True):
        assert b.resident_bytes < a.resident_bytes
        assert b.packed_fp16_bytes > a.packed_fp16_bytes
    with pytest.raises(ConfigError, match="at least 1 token"):
        examiner(window=0)


def test_a_target_counts_all_that_the_question_holds() -> None:
    long = Question(tuple(token_ids(400)[0].tolist()), ((5, 6), (7,)))
    said = examiner().answer([long], nothing)["h2o@4x"][0]
    assert said.fp16_bytes / said.resident_bytes == pytest.approx(4, rel=0.03)


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "parts.jsonl"
    first = examiner(Journal("run", path)).answer(questions()[:2], nothing)
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * (len(CONFIGS) + 1)
    again = examiner(Journal("run", path)).answer(questions(), nothing)
    assert {config: said[:2] for config, said in again.items()} == first
    assert path.read_text().splitlines()[: len(lines)] == lines
    assert len(path.read_text().splitlines()) == 3 * (len(CONFIGS) + 1)


class _Letters:
    """A tokenizer: a letter is a token."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        return SimpleNamespace(input_ids=[3 + ord(letter) % 90 for letter in text])


HELLASWAG = [
    {
        "context": f"{i} the cat is near the tree and {'waits ' * 12}then",
        "label": i % 3,
        "endings": ["it sleeps.", "rain.", "a long way goes on."],
    }
    for i in range(6)
]


@pytest.fixture
def hellaswag(tmp_path: Path) -> Path:
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("\n".join(map(json.dumps, HELLASWAG)))
    return path


@pytest.mark.slow
def test_lm_eval_scores_what_was_answered(hellaswag: Path) -> None:
    """Accuracy is counted here once more, from the model's own likelihoods."""
    asked = examiner(configs=("fp16", "uniform-2"))
    rows = run_task(asked, _Letters(), "hellaswag", hellaswag, ["fp16", "uniform-2"], None, 0, lambda *_: None)
    right, right_norm = [], []
    model = tiny(KIND)
    for line in HELLASWAG:
        scores = []
        for ending in line["endings"]:
            prompt = _Letters()(line["context"]).input_ids
            ids = prompt + _Letters()(f" {ending}").input_ids
            with torch.no_grad():
                row = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(float(row.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum()))
        norms = [score / len(ending) for score, ending in zip(scores, line["endings"], strict=True)]
        right.append(scores.index(max(scores)) == line["label"])
        right_norm.append(norms.index(max(norms)) == line["label"])
    for row in rows:
        assert (row.task, row.questions, row.shots) == ("hellaswag", 6, 0)
        assert row.accuracy_fp16 == pytest.approx(sum(right) / 6)
        assert row.accuracy_norm_fp16 == pytest.approx(sum(right_norm) / 6)
    assert rows[0].agreement == 1
    assert rows[0].accuracy == rows[0].accuracy_fp16
    assert rows[0].difference_stderr == 0
    assert rows[1].compression > rows[0].compression
    shot = run_task(asked, _Letters(), "hellaswag", hellaswag, ["fp16"], 2, 2, lambda *_: None)[0]
    assert (shot.questions, shot.shots) == (2, 2)
    assert shot.prompt_tokens > 2.5 * rows[0].prompt_tokens


@pytest.mark.parametrize(
    ("task", "line", "query", "choices", "gold"),
    [
        (
            "piqa",
            {"goal": "To open it", "sol1": "push", "sol2": "pull", "label": 1},
            "Question: To open it\nAnswer:",
            ["push", "pull"],
            1,
        ),
        (
            "arc_easy",
            {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
            "Question: Why?\nAnswer:",
            ["x", "y"],
            1,
        ),
        (
            "mathqa",
            {"Problem": "1 + 1", "options": "a ) 1 , b ) 2 , c ) 3 , d ) rs . 4 , e ) none", "correct": "b"},
            "Question: 1 + 1\nAnswer:",
            ["1", "2", "3", "rs . 4", "none"],
            1,
        ),
    ],
)
def test_local_files_have_the_shape_of_the_data_set(
    tmp_path: Path, task: str, line: dict[str, Any], query: str, choices: list[str], gold: int
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert read_questions(task, path) == [{"query": query, "choices": choices, "gold": gold}]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("piqa", '{"goal": "a"}', "line 1 of .* is not a question of piqa"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', "the label is not that of an answer"),
        ("piqa", "no json", "line 1 of"),
        ("piqa", "", "has no questions"),
        ("winogrande", "{}", "local files work for arc_challenge"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, task: str, text: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_questions(task, path)
