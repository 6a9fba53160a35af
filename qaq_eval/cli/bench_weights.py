"""`qaq bench weights`: quality and speed of each form of weights."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from services.cli.options import JsonPath, Model, model_or_default
from services.cli.terminal import progress_line, screen

FORMS = "plain,float32,bfloat16,int8,int4"


def weights(
    model: Model = None,
    forms: Annotated[str, typer.Option(help="Forms of the linear layers, separated by commas.")] = FORMS,
    text: Annotated[str, typer.Option(help="A text file, or 'builtin': the reference of Python.")] = "builtin",
    context: Annotated[int, typer.Option(min=2, help="Tokens of each document before the measured ones.")] = 1024,
    decode: Annotated[int, typer.Option(min=1, help="Measured tokens of each document.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="Number of documents, cut from the text.")] = 2,
    json_path: JsonPath = None,
) -> None:
    """Compares the predictions of each form of the linear layers with those of the model's own weights."""
    import torch

    from qaq_core.models import load_model, load_tokenizer
    from qaq_eval.cli.eval.common import read_text
    from qaq_eval.quality import cut_documents
    from qaq_eval.speed.weights_loss import weights_loss

    source = model_or_default(model)
    names = [name.strip() for name in forms.split(",") if name.strip()]
    name, content = read_text(text)
    table = Table("weights", "KL", "ΔNLL", "top-1", "prompt, tokens/s", "median step")
    results = []
    with progress_line() as report:
        chosen = cut_documents(content, load_tokenizer(source), context, decode, documents)
        for result in weights_loss(lambda form: load_model(source, weights=form), chosen, names):
            report(result.weights, None)
            results.append(result)
    for result in results:
        table.add_row(
            result.weights,
            f"{result.kl:.4f}",
            f"{result.nll_delta:+.4f}",
            f"{result.top1:.3f}",
            f"{result.prompt_tokens_per_second:.0f}",
            f"{result.step_ms:.1f} ms",
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
        json_path.write_text(json.dumps({**about, "rows": [asdict(result) for result in results]}, indent=1) + "\n")
