"""The paper's experiments (arXiv 2403.04643), and the questions it leaves open, as configurations to compare.

Light to import: nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        about: the question.
        configs: in the notation of `qaq eval`; none if the experiment measures keys and values instead of predictions.
        contexts: lengths of prompts to compare; --context if there are none.
    """

    about: str
    configs: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()


EXPERIMENTS = {
    "fig2a": Experiment(
        "Keys against values: one side at 1 to 8 bits, the other at 16.",
        tuple(name for bits in range(1, 9) for name in (f"k{bits}v16", f"k16v{bits}")),
    ),
    "fig2c": Experiment("The distribution of keys and values: quantiles of each layer, and outliers."),
    "table2": Experiment(
        "Quantizing against evicting, at the same resident bytes.",
        tuple(f"{name}@{times}x" for times in (4, 6, 8) for name in ("balanced", "paper", "h2o", "scissorhands")),
    ),
    "table3": Experiment(
        "What each part of the paper's method contributes, at the same resident bytes.",
        (
            "paper@4x",
            "paper[outlier_ratio=0]@4x",
            "paper[attention_window=1]@4x",
            "paper-norequant@4x",
            "paper[granularity=head]@4x",
            "paper[granularity=token]@4x",
            "paper[codec=normal]@4x",
            "balanced@4x",
            "balanced-norequant@4x",
        ),
    ),
    "fig3": Experiment(
        "Attention window against outlier ratio, at the same resident bytes.",
        tuple(
            f"paper[attention_window={window}, outlier_ratio={ratio}]@4x"
            for window, ratio in product((1, 3, 5, 8), (0, 0.01, 0.02, 0.05))
        ),
    ),
    "fig4": Experiment(
        "Bits by attention against the same bits for all, over compressions.",
        (
            *(f"paper@{times}x" for times in (2.5, 3, 4, 5)),
            *(f"balanced@{times}x" for times in (3, 4, 6, 8)),
            *(f"uniform-{bits}" for bits in (8, 6, 4, 3, 2)),
            *(f"hadamard-{bits}" for bits in (4, 3, 2)),
            *(f"kivi-{bits}" for bits in (4, 2)),
        ),
    ),
    "context": Experiment(
        "Prompts of growing length; the last one fills the model's context.",
        ("balanced", "balanced@8x", "paper@4x", "uniform-3", "kivi-2"),
        (512, 1024, 2048, 4096, 8192),
    ),
    "attention-window": Experiment(
        "How long the attention window should be, with and without exceptions, at the same resident bytes.",
        tuple(f"paper{kind}[attention_window={n}]@4x" for kind in ("", "-norequant") for n in (1, 2, 3, 5, 8, 16)),
    ),
}
