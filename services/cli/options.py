"""Options of a generation that several commands have, and the messages they make."""

from __future__ import annotations

from typing import Annotated, Any

import typer

MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Over 1: tokens of prompt and answer become less likely.")
]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Off a logit for every time it was generated.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Off a logit that was generated at all.")]
LogitBias = Annotated[
    list[str] | None, typer.Option(metavar="TOKEN=BIAS", help="Added to a token id's logit; may be given again.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
Stop = Annotated[list[str] | None, typer.Option(help="Ends the text before this; may be given again.")]
StopTokenId = Annotated[list[int] | None, typer.Option(help="Ends the text before this; may be given again.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end-of-sequence token.")]
Preset = Annotated[str | None, typer.Option(help="balanced, paper or exact.")]
TargetBits = Annotated[float | None, typer.Option(help="Mean bits per element of the cache.")]
TargetCompression = Annotated[float | None, typer.Option(help="Of the cache against fp16; wins over the bits.")]
TargetError = Annotated[float | None, typer.Option(help="KL in nats a token; wins over both. For balanced.")]
Tenant = Annotated[str | None, typer.Option(envvar="QAQ_TENANT", help="Whose the call is.")]


def given(**fields: Any) -> dict[str, Any]:
    """The options that were given; the rest is left to the server's defaults."""
    return {name: value for name, value in fields.items() if value is not None}


def biases(pairs: list[str] | None) -> dict[int, float] | None:
    """Of --logit-bias.

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
