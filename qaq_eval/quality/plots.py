"""Plots of results as SVG for an HTML page. Needs matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.quality.record import DocumentResult, EvalResult

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigError("plots need matplotlib: pip install 'qaq-kv[eval]'") from error

if TYPE_CHECKING:
    from qaq_eval.quality.long import PositionResult
    from qaq_eval.quality.turns import TurnResult


LEAST_KL = 1e-7
"""What is drawn of less, on logarithmic axes."""
UNPACKED_BITS = 16
"""Bits of tokens in the residual window. They are left out of the colour scale, which they would stretch."""


def losses(results: Sequence[EvalResult]) -> str:
    """KL and ΔNLL over resident bytes, one point per configuration, with standard errors."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    kl, nll = figure.subplots(1, 2)
    for result in results:
        x, name = 100 / result.compression, result.config
        height = max(result.kl_mean, LEAST_KL)
        below = min(result.kl_mean_se, 0.9 * height)  # a logarithmic axis has no place for 0
        kl.errorbar(x, height, yerr=[[below], [result.kl_mean_se]], fmt="o", capsize=3, gid=name)
        nll.errorbar(x, result.delta_nll, yerr=result.delta_nll_se, fmt="o", capsize=3, gid=f"{name} NLL")
        for axes, at in ((kl, height), (nll, result.delta_nll)):
            axes.annotate(name, (x, at), (5, 5), textcoords="offset points", fontsize=9)
    across = "resident bytes, % of fp16, everything counted"
    kl.set(xlabel=across, ylabel="KL, nats per token", title="KL from full precision", yscale="log")
    # Linear near 0, where differences may be negative, and logarithmic above.
    nll.set_yscale("symlog", linthresh=0.01)
    nll.set(xlabel=across, ylabel="ΔNLL, nats per token", title="Loss on the text")
    for axes in (nll, kl):
        axes.grid(alpha=0.3)
        axes.margins(0.12)
    return _svg(figure)


def tails(results: Sequence[DocumentResult], configs: Sequence[str]) -> str:
    """The share of tokens whose KL is at least x, one line per configuration."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots()
    for config in configs:
        every = torch.tensor([kl for result in results if result.config == config for kl in result.kl])
        ordered = every.clamp_min(LEAST_KL).sort(descending=True).values
        shares = torch.arange(1, len(ordered) + 1) / len(ordered)
        # All of the largest ones, and then fewer and fewer: the axes are logarithmic.
        kept = torch.logspace(0, torch.tensor(len(ordered)).log10().item(), 200).round().long().unique() - 1
        ordered, shares = ordered[kept], shares[kept]
        axes.step(ordered.tolist(), shares.tolist(), where="post", label=config, gid=config)
    axes.set(xscale="log", yscale="log", xlabel="KL, nats", ylabel="share of tokens with at least so much")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower left")
    return _svg(figure)


def bits(results: Sequence[DocumentResult], config: str) -> str | None:
    """Bits by layer and position, of keys and values; None if all layers have the same bits."""
    own = [result for result in results if result.config == config]
    maps = [[torch.tensor(result.map_key), torch.tensor(result.map_value)] for result in own]
    if not maps:
        return None
    mean = [torch.stack(side).mean(0) for side in zip(*maps, strict=True)]
    if all(float(side.std(0).max()) < 0.05 for side in mean):
        return None
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    grid = figure.subplots(1, 2)
    both = torch.stack(mean)
    packed = both[both < UNPACKED_BITS / 2]
    top = float(packed.max()) if len(packed) else float(UNPACKED_BITS)
    for axes, side, name in zip(grid, mean, ("keys", "values"), strict=True):
        image = axes.imshow(
            side.numpy(),
            interpolation="none",
            aspect="auto",
            origin="lower",
            vmin=0,
            vmax=top,
            extent=(0, 100, 0, len(side)),
        )
        axes.set(title=f"{config}: {name}", xlabel="position, % of the sequence", ylabel="layer")
        figure.colorbar(image, ax=axes, label="bits per element")
    return _svg(figure)


def exceptions(results: Sequence[DocumentResult], configs: Sequence[str]) -> str | None:
    """Exceptions up to each decode step, the mean over documents, one line per configuration; None without any."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for config in configs:
        own = [result for result in results if result.config == config]
        steps = [result.exceptions_at for result in own if any(result.exceptions_at)]
        if steps:
            drawn = True
            mean = [sum(at) / len(steps) for at in zip(*steps, strict=False)]
            axes.plot(range(1, len(mean) + 1), list(accumulate(mean)), label=config, gid=config)
    if not drawn:
        return None
    axes.set(xlabel="decode step", ylabel="exceptions so far", title="Attention-window exceptions", yscale="symlog")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def turns(results: Sequence[TurnResult]) -> str:
    """ΔNLL and KL of each turn, one line per configuration."""
    return _lines("turn", [(result.config, result.turn, result) for result in results])


def positions(results: Sequence[PositionResult]) -> str:
    """ΔNLL and KL along long answers, one line per configuration."""
    return _lines(
        "decoded tokens", [(result.config, (result.first + result.last - 1) / 2, result) for result in results]
    )


def _lines(axis: str, points: Sequence[tuple[str, float, TurnResult | PositionResult]]) -> str:
    """ΔNLL and KL over something, one line per configuration, with standard errors."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    nll, kl = figure.subplots(1, 2)
    for config in dict.fromkeys(config for config, *_ in points):
        mine = [(x, result) for name, x, result in points if name == config]
        at = [x for x, _ in mine]
        nll.errorbar(at, [r.delta_nll for _, r in mine], [r.delta_nll_se for _, r in mine], capsize=3, label=config)
        kl.plot(at, [max(r.kl_mean, LEAST_KL) for _, r in mine], "o-", label=config, gid=config)
    nll.set(xlabel=axis, ylabel="ΔNLL, nats per token", title="ΔNLL")
    kl.set(xlabel=axis, ylabel="KL, nats per token", title="KL", yscale="log")
    for axes in (nll, kl):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure as one <svg> element; deterministic. What is black takes the colour of the text around it."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qaq"}):
        buffer = io.StringIO()
        for legend in (each for axes in figure.axes if (each := axes.get_legend())):
            legend.get_frame().set_facecolor("none")
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    rounded = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    return rounded[rounded.index("<svg") :].replace("#000000", "currentColor")
