"""Multiple-choice tasks through lm-eval, the harness that published figures come from.

lm-eval makes the prompts and scores the answers; `Examiner` gives it their likelihoods. A
the hub, as lm-eval fetches them, or from a local file of JSON lines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qaq_core.base.errors import ConfigError
from qaq_eval.quality.choices import FULL, Answered, Examiner, Question

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError("multiple choice needs lm-eval: pip install 'qaq-kv[eval]'") from error

SEED = 1234


@dataclass(frozen=True)
class TaskRow:
    """One configuration on one task.

    Attributes:
        stderr: of the accuracy, over questions. difference_stderr: of accuracy - accuracy_fp16, which are paired.
        accuracy_norm: with likelihoods per character of the answer, where the task has it.
        agreement: share of questions with full precision's answer, right or wrong.
        prompt_tokens: mean length of what was quantized.
        compression: fp16 bytes over resident bytes of the prompts' caches.
    """

    task: str
    config: str
    questions: int
    shots: int
    prompt_tokens: float
    accuracy: float
    accuracy_fp16: float
    stderr: float
    difference_stderr: float
    accuracy_norm: float | None
    accuracy_norm_fp16: float | None
    stderr_norm: float | None
    agreement: float
    compression: float
    compression_asymptotic: float | None


def run_task(
    examiner: Examiner,
    tokenizer: Any,
    task: str,
    file: Path | None,
    configs: Sequence[str],
    questions: int | None,
    shots: int,
    progress: Callable[[str, float], None],
) -> list[TaskRow]:
    """The rows of a task.

    Args:
        file: of its questions; from the hub if None.
        questions: how many, from the first on; all if None.
        shots: answered questions put before each, others of the same file (from the hub: of the task's own split).
    Raises:
        ConfigError: the task is unknown or the file is not of its shape.
    """
    if file is None:
        asked: str | ConfigurableTask = task
    else:
        asked = local_task(task, read_questions(task, file))
    # lm-eval reads all its tasks' descriptions for this, which takes half a minute.
    manager = TaskManager(include_defaults=file is None)
    model = _Answering(examiner, tokenizer, lambda share: progress(task, share))
    outcomes = {}
    for config in (FULL, *configs):
        model.config = config
        try:
            found = simple_evaluate(
                model,
                tasks=[asked],
                task_manager=manager,
                num_fewshot=shots,
                limit=questions,
                fewshot_random_seed=SEED,
                bootstrap_iters=0,
            )
        except (KeyError, ValueError, OSError) as error:
            hint = "" if file else "; questions of a local file need no hub (--task-file)"
            raise ConfigError(f"lm-eval cannot run {task}: {error}{hint}") from error
        assert found is not None
        outcomes[config] = _Outcome(found["samples"][task], list(model.answered))
    return [_row(task, config, shots, outcomes[config], outcomes[FULL]) for config in configs]


class _Answering(TemplateLM):
    """lm-eval's model: one configuration of an examiner at a time."""

    def __init__(self, examiner: Examiner, tokenizer: Any, progress: Callable[[float], None]) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, FULL
        self.answered: list[Answered] = []
        self._examiner, self._progress = examiner, progress

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens is not False).input_ids
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Answers of one question come one after the other: they have one context."""
        questions = []
        for _, same in groupby(requests, key=lambda request: (request[0][0], request[1])):
            asked = [(prompt, answer) for _, prompt, answer in same]
            prompt = asked[0][0] if len(asked[0][0]) > 1 else [self.prefix_token_id, *asked[0][0]]
            questions.append(Question(tuple(prompt), tuple(tuple(answer) for _, answer in asked)))
        self.answered = self._examiner.answer(questions, self._progress)[self.config]
        return [pair for a in self.answered for pair in zip(a.log_likelihoods, a.greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise ConfigError("only multiple choice is supported")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise ConfigError("only multiple choice is supported")


@dataclass(frozen=True)
class _Outcome:
    """What lm-eval scored, one sample a question, and what was answered."""

    samples: list[dict[str, Any]]
    answered: list[Answered]

    def scores(self, metric: str) -> list[float] | None:
        """Of each question, 0 or 1, in the order of the questions; None if the task has no such metric."""
        samples = sorted(self.samples, key=lambda sample: sample["doc_id"])
        return [float(sample[metric]) for sample in samples] if metric in samples[0] else None

    def choices(self) -> list[int]:
        return [max(range(len(a.log_likelihoods)), key=a.log_likelihoods.__getitem__) for a in self.answered]


def _row(task: str, config: str, shots: int, mine: _Outcome, full: _Outcome) -> TaskRow:
    got, exact = mine.scores("acc"), full.scores("acc")
    if got is None or exact is None:
        raise ConfigError(f"{task} is not scored by accuracy")
    norm, norm_exact = mine.scores("acc_norm"), full.scores("acc_norm")
    agreed = [a == b for a, b in zip(mine.choices(), full.choices(), strict=True)]
    packed = sum(a.packed_resident for a in mine.answered)
    return TaskRow(
        task=task,
        config=config,
        questions=len(got),
        shots=shots,
        prompt_tokens=_mean([a.tokens for a in mine.answered]),
        accuracy=_mean(got),
        accuracy_fp16=_mean(exact),
        stderr=_error(got),
        difference_stderr=_error([a - b for a, b in zip(got, exact, strict=True)]),
        accuracy_norm=None if norm is None else _mean(norm),
        accuracy_norm_fp16=None if norm_exact is None else _mean(norm_exact),
        stderr_norm=None if norm is None else _error(norm),
        agreement=_mean(agreed),
        compression=sum(a.plain for a in mine.answered) / sum(a.resident for a in mine.answered),
        compression_asymptotic=sum(a.packed_plain for a in mine.answered) / packed if packed else None,
    )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _error(numbers: Sequence[float]) -> float:
    """Standard error of the mean."""
    if len(numbers) < 2:
        return 0.0
    mean = _mean(numbers)
    return math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1) / len(numbers))


# -- local files ---------------------------------------------------------------------------------------

Sheet = dict[str, Any]
"""query, choices, gold: a question in lm-eval's own wording of its task."""

READERS: dict[str, Callable[[dict[str, Any]], Sheet]] = {
    "hellaswag": lambda line: {"query": line["context"], "choices": line["endings"], "gold": int(line["label"])},
    "piqa": lambda line: {
        "query": f"Question: {line['goal']}\nAnswer:",
        "choices": [line["sol1"], line["sol2"]],
        "gold": int(line["label"]),
    },
    "arc_easy": lambda line: {
        "query": f"Question: {line['question']}\nAnswer:",
        "choices": line["choices"]["text"],
        "gold": line["choices"]["label"].index(line["answerKey"]),
    },
    "mathqa": lambda line: {
        "query": f"Question: {line['Problem']}\nAnswer:",
        "choices": [text.strip(" ,") for text in re.split(r"\b[a-e] \) ", line["options"])[1:]],
        "gold": "abcde".index(line["correct"]),
    },
}
READERS["arc_challenge"] = READERS["arc_easy"]


def read_questions(task: str, file: Path) -> list[Sheet]:
    """Questions of a file of JSON lines, in the shape that the task's data set has."""
    read = READERS.get(task)
    if read is None:
        raise ConfigError(f"local files are read for {', '.join(sorted(READERS))}, not for {task!r}")
    questions = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            question = read(json.loads(line))
            if not 0 <= question["gold"] < len(question["choices"]):
                raise ValueError("its label is not that of an answer")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"line {number} of {file} is no question of {task}: {error}") from error
        questions.append(question)
    if not questions:
        raise ConfigError(f"{file} has no questions")
    return questions


def local_task(task: str, questions: list[Sheet]) -> ConfigurableTask:
    """lm-eval's task over these questions; shots are others of them, drawn with a fixed seed."""
    from datasets import Dataset

    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return ConfigurableTask(
        config={
            "task": task,
            "custom_dataset": lambda **settings: {"test": Dataset.from_list(questions)},
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "test",
            "doc_to_text": "query",
            "doc_to_target": "gold",
            "doc_to_choice": "choices",
            "metric_list": metrics,
            "metadata": {"version": 1.0},
        }
    )
