"""Multiple-choice tasks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qaq_eval.cli.eval.common import Asked, Outcome, Report, about, empty_table, shown_name

if TYPE_CHECKING:
    from qaq_core.models import LoadedModel
    from qaq_eval.quality import Config


def run(loaded: LoadedModel, configs: list[Config], asked: Asked, report: Report) -> Outcome:
    from qaq_core.base.errors import ConfigError
    from qaq_eval.quality import tasks
    from qaq_eval.quality.choices import Examiner
    from qaq_eval.quality.journal import Journal, name_of

    strangers = set(asked.task_files) - set(asked.tasks)
    if strangers:
        raise ConfigError(f"--task-file names {', '.join(sorted(strangers))}, which --tasks does not")
    said = {**about(loaded, "choice"), "shots": asked.shots, "window": asked.window}
    examiner = Examiner(loaded.model, loaded.fingerprint, configs, asked.window, Journal(name_of(said), asked.journal))
    names = [config.text for config in configs]
    rows = []
    for done, task in enumerate(asked.tasks):
        rows += tasks.run_task(
            examiner,
            loaded.tokenizer,
            task,
            asked.task_files.get(task),
            names,
            asked.questions,
            asked.shots,
            lambda what, share, done=done: report(what, (done + share) / len(asked.tasks)),  # type: ignore[misc]
        )
    shown = empty_table(
        "Share of questions answered rightly", "task", "config", "smaller", "acc", "fp16", "norm", "fp16", "agree"
    )
    for row in rows:
        shown.add_row(
            row.task,
            shown_name(row.config),
            f"{row.compression:.2f}x",
            f"{row.accuracy:.3f}±{row.stderr:.3f}",
            f"{row.accuracy_fp16:.3f}",
            "" if row.accuracy_norm is None else f"{row.accuracy_norm:.3f}",
            "" if row.accuracy_norm_fp16 is None else f"{row.accuracy_norm_fp16:.3f}",
            f"{row.agreement:.3f}",
        )
    return Outcome({**said, "rows": [asdict(row) for row in rows]}, shown)
