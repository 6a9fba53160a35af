"""Documents that are cut from a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qaq_core.base.errors import ConfigError
from qaq_eval.quality import Document, builtin_text, cut_documents, with_recall
from tests.core.tiny_models import token_ids


def _document(context: int = 200) -> Document:
    return Document(0, token_ids(context + 41)[0], context)


class _Words:
    """A tokenizer: a word is a token; it begins a text with token 1."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        ids = [int(word) for word in text.split()]
        ids = [1, *ids] if add_special_tokens else ids

        class Encoded:
            input_ids = torch.tensor([ids]) if "return_tensors" in kwargs else ids

        return Encoded


def test_documents_follow_each_other() -> None:
    text = " ".join(str(i) for i in range(100, 200))
    first, second = cut_documents(text, _Words(), context=10, decode=4, documents=2, offset_fraction=0.5)
    assert first.ids.tolist() == [1, *range(150, 164)]
    assert second.ids.tolist() == [1, *range(164, 178)]
    assert (first.context, first.decode, second.index) == (10, 4, 1)
    with pytest.raises(ConfigError, match="has 3 documents of 15 tokens after the offset, not 4"):
        cut_documents(text, _Words(), 10, 4, 4, 0.5)


@pytest.mark.parametrize(("context", "decode", "count", "offset"), [(1, 4, 1, 0), (9, 0, 1, 0), (9, 4, 1, 1.0)])
def test_impossible_documents_are_refused(context: int, decode: int, count: int, offset: float) -> None:
    with pytest.raises(ConfigError):
        cut_documents("1 2 3", _Words(), context, decode, count, offset)


def test_recall_repeats_a_passage() -> None:
    document = with_recall(_document())
    assert document.decode == 40
    assert torch.equal(document.ids[200:], document.ids[25:66])
    with pytest.raises(ConfigError, match="too short to repeat"):
        with_recall(_document(60))


def test_the_builtin_text_is_long_enough() -> None:
    assert len(builtin_text()) > 400_000
