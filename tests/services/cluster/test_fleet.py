"""Names of workers, which say whose they are."""

from __future__ import annotations

import pytest

from services.cluster.fleet import Fleet, of_worker
from services.cluster.state import ServedModel


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("worker-0", ""),
        ("worker-12", ""),
        ("worker-SmolLM2-135M-0", "SmolLM2-135M"),
        ("worker-7-0", "7"),
        ("router", None),
        ("originals-0", None),
    ],
)
def test_a_name_says_whose_worker_it_is(name: str, key: str | None) -> None:
    assert of_worker(name) == key


def test_a_model_of_the_hub_gives_names_that_files_may_have() -> None:
    fleet = Fleet.another(ServedModel(model="owner/model-v1"))
    assert fleet.worker(3) == "worker-owner-model-v1-3"
    assert of_worker(fleet.worker(3)) == fleet.key
    assert fleet.mine(["worker-0", fleet.worker(0), "router"]) == [fleet.worker(0)]
    assert fleet.free([fleet.worker(0), "worker-1"], 2) == [fleet.worker(1), fleet.worker(2)]
