"""Plots of what was measured, as SVG that a page can hold. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.quality.record import Part, Row

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigError("plots need matplotlib: pip install 'qaq-kv[eval]'") from error

if TYPE_CHECKING:
    from qaq_eval.quality.turns import TurnRow


EXACT = 16
"""Bits of exact tokens: a colour for them would leave none for the others."""


def losses(rows: Sequence[Row]) -> str:
    """Compression against ΔNLL and against KL, a point per configuration."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    nll, kl = figure.subplots(1, 2)
    for row in rows:
        nll.errorbar(row.compression, row.delta_nll, yerr=row.delta_nll_se, fmt="o", capsize=3, gid=row.config)
        kl.plot(row.compression, max(row.kl_mean, 1e-7), "o", gid=row.config)
        for axes, height in ((nll, row.delta_nll), (kl, max(row.kl_mean, 1e-7))):
            axes.annotate(row.config, (row.compression, height), (4, 4), textcoords="offset points", fontsize=8)
    nll.set(xlabel="compression, all bytes counted", ylabel="ΔNLL, nats a token", title="ΔNLL")
    # Linear near full precision, so that losses under 0 have their place, and logarithmic above.
    nll.set_yscale("symlog", linthresh=0.01)
    kl.set(xlabel="compression, all bytes counted", ylabel="KL, nats a token", title="KL", yscale="log")
    for axes in (nll, kl):
        axes.grid(alpha=0.3)
    return _svg(figure)


def bits(parts: Sequence[Part], config: str) -> str | None:
    """Bits over layers and positions, keys and values; None if the configuration gives all layers the same."""
    maps = [[torch.tensor(part.map_key), torch.tensor(part.map_value)] for part in parts if part.config == config]
    if not maps:
        return None
    mean = [torch.stack(side).mean(0) for side in zip(*maps, strict=True)]
    if all(float(side.std(0).max()) < 0.05 for side in mean):
        return None
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    grid = figure.subplots(1, 2)
    both = torch.stack(mean)
    packed = both[both < EXACT / 2]
    top = float(packed.max()) if len(packed) else float(EXACT)
    for axes, side, name in zip(grid, mean, ("keys", "values"), strict=True):
        image = axes.imshow(
            side.numpy(), aspect="auto", origin="lower", vmin=0, vmax=top, extent=(0, 100, 0, len(side))
        )
        axes.set(title=f"{config}: {name}", xlabel="position, % of the sequence", ylabel="layer")
        figure.colorbar(image, ax=axes, label="bits an element")
    return _svg(figure)


def exceptions(parts: Sequence[Part], configs: Sequence[str]) -> str | None:
    """Exceptions up to each decode step, a line per configuration, the mean over documents; None without any."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for config in configs:
        steps = [part.exceptions_at for part in parts if part.config == config and any(part.exceptions_at)]
        if steps:
            drawn = True
            mean = [sum(at) / len(steps) for at in zip(*steps, strict=False)]
            axes.plot(range(1, len(mean) + 1), list(accumulate(mean)), label=config, gid=config)
    if not drawn:
        return None
    axes.set(xlabel="decode step", ylabel="exceptions so far", title="Rows asked for again", yscale="symlog")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def turns(rows: Sequence[TurnRow]) -> str:
    """ΔNLL and KL of each turn, a line per configuration."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    nll, kl = figure.subplots(1, 2)
    for config in dict.fromkeys(row.config for row in rows):
        mine = [row for row in rows if row.config == config]
        at = [row.turn for row in mine]
        nll.errorbar(at, [r.delta_nll for r in mine], [r.delta_nll_se for r in mine], capsize=3, label=config)
        kl.plot(at, [max(r.kl_mean, 1e-7) for r in mine], "o-", label=config, gid=config)
    nll.set(xlabel="turn", ylabel="ΔNLL, nats a token", title="ΔNLL")
    kl.set(xlabel="turn", ylabel="KL, nats a token", title="KL", yscale="log")
    for axes in (nll, kl):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Any) -> str:
    """The figure as one <svg> element, the same for the same figures."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qaq"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
