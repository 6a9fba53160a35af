"""Pages of a session are named by their content."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qaq_core import InProcessOriginals, PageShape, page_id
from qaq_core.loading import LoadedModel
from services.worker.session import PageNames
from tests.services.worker.conftest import MakeEngine, outcome, request

SHAPE = PageShape(layers=2, kv_heads=1, tokens=4, head_dim=8)


def test_names_chain_over_the_log() -> None:
    log = list(range(8))
    names = PageNames("model", SHAPE, b"salt", log)
    second = names(1)
    first = page_id("model", "float32", b"salt", b"", [0, 1, 2, 3])
    assert names(0) == first
    assert second == page_id("model", "float32", b"salt", first, [4, 5, 6, 7])
    log += range(8, 12)
    assert names(2) == page_id("model", "float32", b"salt", second, [8, 9, 10, 11])


def test_same_text_after_another_start_is_another_page() -> None:
    one = PageNames("model", SHAPE, b"", [0, 0, 0, 0, 1, 2, 3, 4])
    two = PageNames("model", SHAPE, b"", [9, 0, 0, 0, 1, 2, 3, 4])
    assert one(1) != two(1)
    assert one(0) != PageNames("model", SHAPE, b"salt", [0, 0, 0, 0])(0)
    assert one(0) != PageNames("other", SHAPE, b"", [0, 0, 0, 0])(0)


def test_a_page_is_not_named_before_its_tokens_are_known() -> None:
    with pytest.raises(IndexError, match="before its tokens"):
        PageNames("model", SHAPE, b"", [1, 2, 3, 4, 5])(1)


async def test_pages_of_two_turns(
    smollm2: LoadedModel, make_engine: MakeEngine, ids: Callable[[str], list[int]]
) -> None:
    store = InProcessOriginals()
    log = ids("The tide tables were pinned beside the door. " * 5)
    async with make_engine(store, page_tokens=16, tenant_salt="pepper") as engine:
        for _ in range(2):
            result = await outcome(engine.submit(request(log, 20, session_id="s", keep=True)))
            log = [*log, *result.tokens]
        names, parent = [], b""
        for start in range(0, (len(log) - 1) // 16 * 16, 16):
            parent = page_id(smollm2.fingerprint, "float32", b"pepper", parent, log[start : start + 16])
            names.append(parent)
        assert store.match(names).result() == len(names) >= 5
        assert store.match([*names, b"x"]).result() == len(names)
