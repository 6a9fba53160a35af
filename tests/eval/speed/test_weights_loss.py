"""What forms of weights cost is measured against plain ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import jsonschema
import pytest
import torch

from qaq_core.models import LoadedModel
from qaq_core.models.linear import pack
from qaq_eval.quality.documents import Document
from qaq_eval.speed.weights_loss import weights_loss
from tests.core.tiny_models import tiny, token_ids

SCHEMA = Path(__file__).parents[3] / "qaq_eval" / "schemas" / "bench_weights.json"


def loaded(weights: str) -> LoadedModel:
    model = tiny("llama-gqa")
    pack(model, weights)
    return LoadedModel(model, None, "tiny", "tiny", "00", torch.float32, 512, weights)


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no AVX-512",
)
def test_plain_weights_cost_nothing_and_coarser_ones_more() -> None:
    documents = [Document(i, token_ids(61, seed=i)[0], 40) for i in range(2)]
    rows = {row.weights: row for row in weights_loss(loaded, documents, ["float32", "int4"])}
    assert list(rows) == ["plain", "float32", "int4"]
    assert (rows["plain"].kl, rows["plain"].nll_delta, rows["plain"].top1) == (0, 0, 1)
    assert rows["float32"].kl == pytest.approx(0, abs=1e-5)
    assert rows["int4"].kl > 10 * abs(rows["float32"].kl)
    item = json.loads(SCHEMA.read_text())["properties"]["rows"]["items"]
    for row in rows.values():
        jsonschema.validate(asdict(row), item)
