"""What results mean, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qaq_eval.quality.record import EvalResult

ERRORS = 2
"""Standard errors within which a difference is not told from none."""


def summary(results: Sequence[EvalResult]) -> list[str]:
    """Sentences about all configurations together: which of them no other beats, and which are beaten by whom."""
    best = [result for result in results if not beaten_by(result, results)]
    lines = [
        f"Of {len(results)} configurations, no other has both fewer bytes and a smaller mean KL than "
        f"{listed([result.config for result in best])}."
    ]
    for result in results:
        if by := beaten_by(result, results):
            lines.append(f"{result.config} is beaten in both by {listed([other.config for other in by])}.")
    return lines


def beaten_by(result: EvalResult, results: Sequence[EvalResult]) -> list[EvalResult]:
    """The configurations that are smaller and nearer to full precision."""
    return [other for other in results if other.compression > result.compression and other.kl_mean < result.kl_mean]


def verdict(result: EvalResult) -> str:
    """What one configuration costs and gives."""
    return (
        f"{1 / result.compression:.1%} of the bytes of fp16 ({result.compression:.2f}x smaller). {_agreement(result)} "
        f"{_loss(result)} {_tail(result)}"
    )


def _agreement(result: EvalResult) -> str:
    other = 1 - result.top1_agreement
    if not other:
        return f"At all {result.tokens:,} tokens the most likely one is that of full precision."
    return f"At one token in {1 / other:.0f} another one is the most likely ({result.top1_agreement:.1%} agree)."


def _loss(result: EvalResult) -> str:
    """Whether the text was predicted worse, and by how much."""
    measured = f"ΔNLL {result.delta_nll:+.4f} ± {result.delta_nll_se:.4f} nats a token"
    if abs(result.delta_nll) <= ERRORS * result.delta_nll_se:
        return f"{measured}: within {ERRORS} standard errors, this text is predicted as well as in full precision."
    percent = 100 * math.expm1(min(result.delta_nll, 50.0))
    direction = "rises" if percent > 0 else "falls"
    return f"{measured}: perplexity {direction} by {abs(percent):.1f}%."


def _tail(result: EvalResult) -> str:
    return (
        f"Mean KL is {result.kl_mean:.4f} ± {result.kl_mean_se:.4f} nats; one token in 100 has {result.kl_p99:.3f} or "
        f"more, the worst {result.kl_max:.2f}."
    )


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
