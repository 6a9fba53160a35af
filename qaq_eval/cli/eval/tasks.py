"""`qaq eval --tasks`: multiple-choice tasks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qaq_eval.cli.eval.common import EvalOptions, EvalOutput, Report, about_model, config_cell, empty_table

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config


def run(loaded: LoadedModel, configs: list[Config], options: EvalOptions, report: Report) -> EvalOutput:
    from qaq_core.base.errors import ConfigError
    from qaq_eval.quality import tasks
    from qaq_eval.quality.choices import ChoiceEvaluator
    from qaq_eval.quality.journal import Journal, name_of

    unknown = set(options.task_files) - set(options.tasks)
    if unknown:
        raise ConfigError(f"--task-file names {', '.join(sorted(unknown))}, which --tasks does not")
    about = {**about_model(loaded, "choice"), "shots": options.shots, "window": options.window}
    journal = Journal(name_of(about), options.journal)
    evaluator = ChoiceEvaluator(loaded.model, loaded.fingerprint, configs, options.window, journal)
    names = [config.text for config in configs]
    results = []
    for done, task in enumerate(options.tasks):
        results += tasks.run_task(
            evaluator,
            loaded.tokenizer,
            task,
            options.task_files.get(task),
            names,
            options.questions,
            options.shots,
            lambda stage, share, done=done: report(stage, (done + share) / len(options.tasks)),  # type: ignore[misc]
        )
    table = empty_table("Share of correct answers", "task", "config", "smaller", "acc", "fp16", "norm", "fp16", "agree")
    for result in results:
        table.add_row(
            result.task,
            config_cell(result.config),
            f"{result.compression:.2f}x",
            f"{result.accuracy:.3f}±{result.stderr:.3f}",
            f"{result.accuracy_fp16:.3f}",
            "" if result.accuracy_norm is None else f"{result.accuracy_norm:.3f}",
            "" if result.accuracy_norm_fp16 is None else f"{result.accuracy_norm_fp16:.3f}",
            f"{result.agreement:.3f}",
        )
    return EvalOutput({**about, "rows": [asdict(result) for result in results]}, table)
