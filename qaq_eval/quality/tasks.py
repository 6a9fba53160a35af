"""Multiple-choice tasks through lm-eval, the harness of most published results.

lm-eval makes the prompts and scores the answers. A `ChoiceEvaluator` computes their likelihoods. Questions come from
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
from qaq_eval.quality.choices import FULL_PRECISION, ChoiceEvaluator, Question, QuestionResult

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError("multiple choice needs lm-eval: pip install 'qaq-kv[eval]'") from error

SEED = 1234


@dataclass(frozen=True)
class TaskResult:
    """One configuration on one task.

    Attributes:
        stderr: standard error of the accuracy over questions.
        difference_stderr: standard error of accuracy - accuracy_fp16, paired by question.
        accuracy_norm: with likelihoods per character of the answer; None if the task has no such metric.
        agreement: share of questions with the same answer as full precision, right or wrong.
        prompt_tokens: mean length of the quantized prompts.
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
    evaluator: ChoiceEvaluator,
    tokenizer: Any,
    task: str,
    file: Path | None,
    configs: Sequence[str],
    questions: int | None,
    shots: int,
    progress: Callable[[str, float], None],
) -> list[TaskResult]:
    """The result of each configuration on a task.

    Args:
        file: the questions; None takes them from the hub.
        questions: the number of questions, from the first on; None takes all.
        shots: the number of answered questions before each question, from the same file or the task's own split.
    Raises:
        ConfigError: the task is unknown, or the file has another format.
    """
    if file is None:
        source: str | ConfigurableTask = task
    else:
        source = local_task(task, read_questions(task, file))
    # With the defaults, lm-eval reads the descriptions of all its tasks, which takes half a minute.
    manager = TaskManager(include_defaults=file is None)
    model = _LmEvalModel(evaluator, tokenizer, lambda share: progress(task, share))
    scores = {}
    for config in (FULL_PRECISION, *configs):
        model.config = config
        try:
            output = simple_evaluate(
                model,
                tasks=[source],
                task_manager=manager,
                num_fewshot=shots,
                limit=questions,
                fewshot_random_seed=SEED,
                bootstrap_iters=0,
            )
        except (KeyError, ValueError, OSError) as error:
            hint = "" if file else "; --task-file takes questions from a local file"
            raise ConfigError(f"lm-eval cannot run {task}: {error}{hint}") from error
        assert output is not None
        scores[config] = TaskScores(output["samples"][task], list(model.results))
    return [_summarize(task, config, shots, scores[config], scores[FULL_PRECISION]) for config in configs]


class _LmEvalModel(TemplateLM):
    """A model for lm-eval: one configuration of an evaluator at a time."""

    def __init__(self, evaluator: ChoiceEvaluator, tokenizer: Any, progress: Callable[[float], None]) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, FULL_PRECISION
        self.results: list[QuestionResult] = []
        self._evaluator, self._progress = evaluator, progress

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
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Answers of one question are consecutive requests with the same context."""
        questions = []
        for _, same in groupby(requests, key=lambda request: (request[0][0], request[1])):
            pairs = [(prompt, answer) for _, prompt, answer in same]
            prompt = pairs[0][0] if len(pairs[0][0]) > 1 else [self.prefix_token_id, *pairs[0][0]]
            questions.append(Question(tuple(prompt), tuple(tuple(answer) for _, answer in pairs)))
        self.results = self._evaluator.answer(questions, self._progress)[self.config]
        return [pair for r in self.results for pair in zip(r.log_likelihoods, r.greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise ConfigError("only multiple choice is supported")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise ConfigError("only multiple choice is supported")


@dataclass(frozen=True)
class TaskScores:
    """lm-eval's samples, one per question, and the results that they were scored from."""

    samples: list[dict[str, Any]]
    results: list[QuestionResult]

    def scores(self, metric: str) -> list[float] | None:
        """The metric of each question, 0 or 1, in their order; None if the task has no such metric."""
        samples = sorted(self.samples, key=lambda sample: sample["doc_id"])
        return [float(sample[metric]) for sample in samples] if metric in samples[0] else None

    def choices(self) -> list[int]:
        """The index of the most likely answer to each question."""
        return [max(range(len(r.log_likelihoods)), key=r.log_likelihoods.__getitem__) for r in self.results]


def _summarize(task: str, config: str, shots: int, own: TaskScores, full: TaskScores) -> TaskResult:
    accuracy, accuracy_full = own.scores("acc"), full.scores("acc")
    if accuracy is None or accuracy_full is None:
        raise ConfigError(f"lm-eval does not score {task} by accuracy")
    norm, norm_full = own.scores("acc_norm"), full.scores("acc_norm")
    agreed = [a == b for a, b in zip(own.choices(), full.choices(), strict=True)]
    packed = sum(r.packed_bytes for r in own.results)
    return TaskResult(
        task=task,
        config=config,
        questions=len(accuracy),
        shots=shots,
        prompt_tokens=_mean([r.tokens for r in own.results]),
        accuracy=_mean(accuracy),
        accuracy_fp16=_mean(accuracy_full),
        stderr=_error(accuracy),
        difference_stderr=_error([a - b for a, b in zip(accuracy, accuracy_full, strict=True)]),
        accuracy_norm=None if norm is None else _mean(norm),
        accuracy_norm_fp16=None if norm_full is None else _mean(norm_full),
        stderr_norm=None if norm is None else _error(norm),
        agreement=_mean(agreed),
        compression=sum(r.fp16_bytes for r in own.results) / sum(r.resident_bytes for r in own.results),
        compression_asymptotic=sum(r.packed_fp16_bytes for r in own.results) / packed if packed else None,
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

LocalQuestion = dict[str, Any]
"""query, choices, gold: a question in the wording that lm-eval uses for its task."""

READERS: dict[str, Callable[[dict[str, Any]], LocalQuestion]] = {
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


def read_questions(task: str, file: Path) -> list[LocalQuestion]:
    """Questions from a file of JSON lines in the format of the task's data set."""
    read = READERS.get(task)
    if read is None:
        raise ConfigError(f"local files work for {', '.join(sorted(READERS))}, not for {task!r}")
    questions = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            question = read(json.loads(line))
            if not 0 <= question["gold"] < len(question["choices"]):
                raise ValueError("the label is not that of an answer")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"line {number} of {file} is not a question of {task}: {error}") from error
        questions.append(question)
    if not questions:
        raise ConfigError(f"{file} has no questions")
    return questions


def local_task(task: str, questions: list[LocalQuestion]) -> ConfigurableTask:
    """An lm-eval task over these questions. Shots are other questions of them, drawn with a fixed seed."""
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
