"""A bit policy of your own, compared with the default policy at the same number of bits.

python examples/own_policy.py --target-bits 3

The policy gives the first layers more bits than the last ones. docs/extending.md explains its parts.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from qaq_core import QAQCache, Quantizer, Target, register_preset
from qaq_core.allocation import NoStatistic, View
from qaq_core.models import ModelShape, default_model_path, load_model
from qaq_core.quantization import GaussianCodec, IdentityTransform


class EarlyLayersPolicy:
    """8 bits in the first layer and one bit less for every 1/λ layers, down to 1."""

    exceptions = elastic = False
    every = narrow_every = 1
    hysteresis = rise = 1.0
    lam = 0.25

    def demand(self, view: View) -> torch.Tensor:
        layers = torch.arange(view.shape[0], device=view.importance.device)
        return layers[:, None, None].expand(view.shape)

    def widths(self, layer: torch.Tensor, lam: float, *, need: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        bits = (8 - layer * lam / need).round().clamp(1, 8).to(torch.uint8)
        return 2 * bits, 2 * bits  # widths are counted in half bits


def early_layers(model: Any, shape: ModelShape, fingerprint: str | None, target: Target) -> dict[str, Any]:
    return {
        "quantizer": Quantizer(IdentityTransform(), GaussianCodec()),
        "policy": EarlyLayersPolicy(),
        "statistic": NoStatistic(),
        "target": target,
    }


register_preset("early-layers", early_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="local directory, GGUF file or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--target-bits", type=float, default=3.0)
    options = parser.parse_args()

    loaded = load_model(options.model or str(default_model_path()))
    text = "The history of the lighthouse begins with fires on hills. " * 12 + "It ends with"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        exact = next_tokens(loaded.model, ids, None)
        for preset in ("early-layers", "balanced"):
            cache = QAQCache.for_model(
                loaded.model, preset=preset, fingerprint=loaded.fingerprint, target_bits=options.target_bits
            )
            predicted = next_tokens(loaded.model, ids, cache)
            kl = torch.nn.functional.kl_div(predicted, exact, reduction="batchmean", log_target=True)
            (held,) = cache.stats()
            print(f"{preset}: {held.compression:.1f} times smaller, KL {kl:.4f} nats a token")


def next_tokens(model: Any, ids: torch.Tensor, cache: QAQCache | None, decoded: int = 8) -> torch.Tensor:
    """Log-probabilities [decoded, vocabulary] after each of the last tokens, fed one at a time."""
    output = model(ids[:, :-decoded], past_key_values=cache, use_cache=True)
    rows = []
    for token in ids[0, -decoded:]:
        output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        rows.append(output.logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


if __name__ == "__main__":
    main()
