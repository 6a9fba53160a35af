"""`qaq bench weights`: what each form of weights costs, and how fast it is."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from services.cli.stack import JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen

FORMS = "plain,float32,bfloat16,int8,int4"


def weights(
    model: Model = None,
    forms: Annotated[str, typer.Option(help="By comma.")] = FORMS,
    text: Annotated[str, typer.Option(help="A text file; 'builtin' is the built-in text.")] = "builtin",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a document before those that count.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Tokens of a document that count.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="How many.")] = 2,
    json_path: JsonPath = None,
) -> None:
    """Compares predictions with each form of the linear layers' weights to those with the model's own."""
    import torch

    from qaq_core.models import load_model, load_tokenizer
    from qaq_eval.cli.eval.common import named_text
    from qaq_eval.quality import cut
    from qaq_eval.speed.weights_loss import weights_loss

    source = model_or_default(model)
    names = [name.strip() for name in forms.split(",") if name.strip()]
    name, words = named_text(text)
    table = Table("weights", "KL", "ΔNLL", "top-1", "prompt, tokens/s", "median step")
    rows = []
    with progress_line() as report:
        chosen = cut(words, load_tokenizer(source), context, decode, documents)
        for row in weights_loss(lambda form: load_model(source, weights=form), chosen, names):
            report(row.weights, None)
            rows.append(row)
    for row in rows:
        table.add_row(
            row.weights,
            f"{row.kl:.4f}",
            f"{row.nll_delta:+.4f}",
            f"{row.top1:.3f}",
            f"{row.prompt_tokens_per_second:.0f}",
            f"{row.step_ms:.1f} ms",
        )
    screen.print(table, highlight=False)
    if json_path is not None:
        about = {
            "model": source,
            "text": name,
            "context": context,
            "decode": decode,
            "documents": documents,
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        json_path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
