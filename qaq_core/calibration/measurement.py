"""Measuring a model: once, on text that it samples itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import DynamicCache

from qaq_core.calibration import sensitivities
from qaq_core.calibration.calibration import GRADIENTS, PERTURBATION, Calibration, cached_at, kept_at, known
from qaq_core.calibration.duration import Pace, Progress, estimate, told
from qaq_core.calibration.moments import SINKS, QueryNorms, moments
from qaq_core.calibration.sampled_text import sample
from qaq_core.models.fingerprint import leave_fingerprint, left_fingerprint, weights_fingerprint
from qaq_core.models.shape import ModelShape
from qaq_core.quantization.transforms.whitening import whitened

SEQUENCES, TOKENS = 6, 1024
PERTURBATION_TOKENS = 256

log = logging.getLogger(__name__)
_shown: ContextVar[Progress | None] = ContextVar("progress of a calibration", default=None)


@contextmanager
def shown(progress: Progress) -> Iterator[None]:
    """While this lasts, a model that has to be calibrated reports (what is done, share done) to `progress`."""
    token = _shown.set(progress)
    try:
        yield
    finally:
        _shown.reset(token)


def calibrate(
    model: Any, shape: ModelShape, fingerprint: str | None = None, progress: Progress | None = None
) -> Calibration:
    """The model's calibration: shipped, cached from before, or measured now and cached.

    Cached under $QAQ_CACHE_DIR (default ~/.cache/qaq), by the fingerprint of the file that the model came from, or of
    its weights in memory.

    Args:
        fingerprint: of the model; if not given, the one that `load_model` left on it, or that of the weights.
        progress: called with a stage and how much of it is done, 0 to 1, while something is measured.
    Raises:
        ConfigError: the fingerprint is another model's.
    """
    named = fingerprint or left_fingerprint(model)
    calibration = known(named) if named else None
    if named is None or calibration is None:
        weights = weights_fingerprint(model, shape)
        calibration = known(weights)
        if named is None:
            leave_fingerprint(model, weights)
        named = named or weights
    cached = cached_at(named)
    calibration = calibration or _measured_once(model, shape, cached, progress)
    calibration.check(shape)
    if calibration.source != GRADIENTS:
        log.warning(
            "the calibration of %s was measured by %s, for want of memory for gradients; "
            "more memory and deleting %s give the better one",
            type(model).__name__,
            calibration.source,
            cached,
        )
    return calibration


def _measured_once(model: Any, shape: ModelShape, path: Path, progress: Progress | None) -> Calibration:
    """Measured by this process, or by another that was at it already."""
    calibration = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock"), type(model).__name__):
            calibration = kept_at(path)
            if calibration is None:
                pace = _announced(model, f"it is kept in {path} and read from there the next time", progress)
                calibration = measure(model, shape, progress=pace)
                calibration.save(path)
    except OSError as error:
        log.warning("calibrating without keeping it: %s cannot be written (%s)", path, error)
        if calibration is None:
            calibration = measure(model, shape, progress=_announced(model, "it is not kept", progress))
    return calibration


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Holds a lock, and says so if that takes a wait."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process, which calibrates %s", name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _announced(model: Any, kept: str, progress: Progress | None) -> Pace:
    """One sentence before minutes of silence, and one for each of them; where progress is shown, the log alone has it.

    Returns:
        what the measurement reports to.
    """
    report = progress or _shown.get()
    level = logging.INFO if report else logging.WARNING
    log.log(
        level,
        "calibrating %s once, on text that it samples itself, which takes about %s here; %s. Without the wait: "
        "preset='fp16', or a table that was measured before (docs/calibration.md); progress= shows how far it is",
        type(model).__name__,
        told(estimate(model, TOKENS)),
        kept,
    )
    return Pace(type(model).__name__, level, report)


@torch.inference_mode(False)  # who makes a cache where gradients are off for good needs some all the same
def measure(
    model: Any,
    shape: ModelShape,
    sequences: int = SEQUENCES,
    tokens: int = TOKENS,
    progress: Progress | None = None,
    seed: int = 0,
    source: str | None = None,
) -> Calibration:
    """Samples text from the model and measures keys, values and queries on it.

    Takes about one backward pass a sequence; for a 135M model and 6 x 1,024 tokens minutes on one core.

    Args:
        source: how to measure sensitivities; None takes gradients if their memory is there, else perturbation.
    """
    report = progress or _shown.get() or (lambda what, share: None)
    tokens = min(tokens, model.config.get_text_config(decoder=True).max_position_embeddings)
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with _prepared(model):
        source = source or _affordable(model, tokens, device)
        with QueryNorms(model, shape) as queries:
            text, cache = sample(model, sequences, tokens, generator, report)
        means, covariances = moments(shape, cache)
        del cache
        fisher = None
        if source == GRADIENTS:
            try:
                fisher = _fisher_by_gradients(model, shape, text, generator, report)
            except (MemoryError, RuntimeError) as error:
                if not sensitivities.is_out_of_memory(error):
                    raise
                log.warning("no memory for gradients (%s): measuring sensitivities by perturbation", error)
        if fisher is None:
            source = PERTURBATION
            fisher = _fisher_by_perturbation(model, shape, text, generator, report)
    matrices, costs = whitened(covariances, fisher)
    return Calibration(
        key_matrix=matrices[0],
        value_matrix=matrices[1],
        key_mean=means[0].float(),
        value_mean=means[1].float(),
        key_costs=costs[0],
        value_costs=costs[1],
        query_norm=queries.norm,
        source=source,
    )


@torch.no_grad()
def own_text(model: Any, progress: Progress | None = None, seed: int = 0) -> tuple[torch.Tensor, DynamicCache]:
    """The text that `measure` samples, for others who measure something on it: ids [sequences, tokens], their cache."""
    report = progress or _shown.get() or (lambda what, share: None)
    tokens = min(TOKENS, model.config.get_text_config(decoder=True).max_position_embeddings)
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    return sample(model, SEQUENCES, tokens, generator, report)


def _fisher_by_gradients(
    model: Any, shape: ModelShape, text: torch.Tensor, generator: torch.Generator, report: Progress
) -> torch.Tensor:
    """F of keys and of values, float64 [2, layers, kv_heads, head_dim, head_dim]."""
    products = torch.zeros((), dtype=torch.float64, device=text.device)
    for i, row in enumerate(text):
        products = products + sensitivities.by_gradients(model, shape, row[None], generator)
        report("calibrating", (i + 1) / len(text))
    return products / _counted(text)


def _fisher_by_perturbation(
    model: Any, shape: ModelShape, text: torch.Tensor, generator: torch.Generator, report: Progress
) -> torch.Tensor:
    """As if all directions of a head cost the same."""
    text = text[:1, :PERTURBATION_TOKENS]
    layers = []
    for found in sensitivities.by_perturbation(model, shape, text, generator):
        layers.append(found)
        report("calibrating without gradients", len(layers) / shape.layers)
    means = torch.stack(layers, 1) / _counted(text)
    return means[..., None, None] * torch.eye(shape.head_dim, dtype=torch.float64, device=text.device)


def _counted(text: torch.Tensor) -> int:
    """Tokens [sequences, tokens] that sensitivities are means over."""
    return len(text) * (text.shape[1] - SINKS)


def _affordable(model: Any, tokens: int, device: torch.device) -> str:
    """Which way of measuring sensitivities fits in the memory that is free."""
    need, free = sensitivities.gradient_bytes(model, tokens), sensitivities.free_bytes(device)
    if need <= free:
        return GRADIENTS
    log.warning(
        "gradients of %s would take %.1f GB and %.1f GB are free: measuring sensitivities by perturbation",
        type(model).__name__,
        need / 1e9,
        free / 1e9,
    )
    return PERTURBATION


@contextmanager
def _prepared(model: Any) -> Iterator[None]:
    """No gradients for weights, and transformers' own attention, while this lasts."""
    was = model.config._attn_implementation
    requires = [parameter.requires_grad for parameter in model.parameters()]
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in zip(model.parameters(), requires, strict=True):
            parameter.requires_grad_(required)
        model.set_attn_implementation(was)
