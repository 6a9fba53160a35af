"""Options that several commands share, and the messages that they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

# -- the model and its cache ---------------------------------------------------------------------------

DEVICE = typer.Option(envvar="QAQ_DEVICE", help="cpu, cuda or cuda:<n>.")
DTYPE = typer.Option(envvar="QAQ_DTYPE", help="auto, float32, float16 or bfloat16.")
_PRESETS = "balanced, paper or fp16."
_BITS = "Mean bits per element of a cache; default: the preset's."

Model = Annotated[
    str | None,
    typer.Option(envvar="QAQ_MODEL", help="Local directory, GGUF file or hub id; default: SmolLM2-135M."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Local directory, GGUF file or hub id; repeatable: the first is the default model. "
        "Default: QAQ_MODEL, else SmolLM2-135M.",
    ),
]
Device = Annotated[str, DEVICE]
Dtype = Annotated[str, DTYPE]
Weights = Annotated[
    str,
    typer.Option(envvar="QAQ_WEIGHTS", help="Form of the linear layers: auto, plain, float32, bfloat16, int8 or int4."),
]
Compiled = Annotated[
    bool, typer.Option("--compiled", envvar="QAQ_COMPILED", help="Run decode steps under torch.compile.")
]
# Of the workers that are started; a request's own are not read from the environment.
StackPreset = Annotated[str, typer.Option(envvar="QAQ_PRESET", help=_PRESETS)]
StackTargetBits = Annotated[float | None, typer.Option(envvar="QAQ_TARGET_BITS", help=_BITS)]
TargetBits = Annotated[float | None, typer.Option(help=_BITS)]

# -- a stack -------------------------------------------------------------------------------------------

Workers = Annotated[int, typer.Option(min=1, help="Number of workers, of each model.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the result to this file as JSON.")]

# -- a generation --------------------------------------------------------------------------------------

MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the most likely tokens; 0 keeps all.")]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens below this times the probability of the most likely one.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: tokens of the prompt and the answer become less likely.")
]
FrequencyPenalty = Annotated[
    float | None, typer.Option(help="Subtracted from a token's logit for each time it was generated.")
]
PresencePenalty = Annotated[float | None, typer.Option(help="Subtracted from a token's logit once it was generated.")]
LogitBias = Annotated[
    list[str] | None, typer.Option(metavar="TOKEN=BIAS", help="Added to the logit of a token id; repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text before this string; repeatable.")]
StopTokenId = Annotated[list[int] | None, typer.Option(help="End the text before this token id; repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Continue after the end-of-sequence token.")]
Preset = Annotated[str | None, typer.Option(help=_PRESETS)]
TargetCompression = Annotated[
    float | None, typer.Option(help="Compression of the cache against fp16; overrides --target-bits.")
]
TargetError = Annotated[
    float | None, typer.Option(help="KL divergence in nats per token, for balanced; overrides both other targets.")
]
Tenant = Annotated[str | None, typer.Option(envvar="QAQ_TENANT", help="Tenant of the call, where no key says it.")]


def model_or_default(model: str | None) -> str:
    """As `found`; without a name, the default model's source.

    Raises:
        ModelLoadError: no model was named and the default model's package is not installed.
    """
    if model is None:
        from qaq_core.models import default_model_path

        return str(default_model_path())
    return found(model)


def models_or_default(models: list[str] | None) -> list[str]:
    """As `model_or_default`, of several; without any, what QAQ_MODEL says."""
    if models:
        return [found(model) for model in models]
    return [model_or_default(os.environ.get("QAQ_MODEL") or None)]


def found(model: str) -> str:
    """The source of a model. Files and directories become absolute, since servers may run elsewhere."""
    return os.path.abspath(model) if os.path.exists(model) else model


def given(**fields: Any) -> dict[str, Any]:
    """The options that were given. The server's defaults apply to the rest."""
    return {name: value for name, value in fields.items() if value is not None}


def biases(pairs: list[str] | None) -> dict[int, float] | None:
    """The logit biases of --logit-bias.

    Raises:
        typer.BadParameter: one is not TOKEN=BIAS.
    """
    try:
        parts = [pair.split("=", 1) for pair in pairs or ()]
        return {int(token): float(bias) for token, bias in parts} or None
    except ValueError as error:
        raise typer.BadParameter("give TOKEN=BIAS, as in 504=-100", param_hint="--logit-bias") from error


def metadata(tenant: str | None) -> tuple[tuple[str, str], ...]:
    return (("qaq-tenant", tenant),) if tenant else ()
