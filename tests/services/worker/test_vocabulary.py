from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from qaq_core.models import LoadedModel
from services.worker.vocabulary import Vocabulary

TEXT = "Zażółć — “naïve” 日本語 🏔️\tend\n"


def test_byte_level_tokens_join_to_the_text(smollm2: LoadedModel) -> None:
    vocabulary = Vocabulary(smollm2.tokenizer.backend_tokenizer)
    parts = [vocabulary.bytes_of(token) for token in smollm2.tokenizer.encode(TEXT)]
    assert b"".join(parts) == TEXT.encode()
    assert any(part.decode(errors="replace").encode() != part for part in parts), "no token is a part of a character"


def test_every_token_of_a_model_has_its_bytes(smollm2: LoadedModel) -> None:
    backend = smollm2.tokenizer.backend_tokenizer
    vocabulary = Vocabulary(backend)
    for token in range(backend.get_vocab_size()):
        alone = backend.decode([token], skip_special_tokens=False)
        assert vocabulary.bytes_of(token).decode(errors="replace") == alone


def test_special_tokens(smollm2: LoadedModel) -> None:
    vocabulary = Vocabulary(smollm2.tokenizer.backend_tokenizer)
    end = smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert vocabulary.is_special(end)
    assert vocabulary.bytes_of(end) == b"<|im_end|>"
    assert not vocabulary.is_special(504)
    assert vocabulary.bytes_of(10**9) == b""


def made(decoder: object, words: list[str]) -> tuple[Vocabulary, dict[str, int]]:
    ids = {word: place for place, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Vocabulary(backend), ids


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    ],
)
def test_tokens_of_single_bytes(decoder: object) -> None:
    vocabulary, ids = made(decoder, ["▁the", "<0xE2>", "<0x82>", "<0xAC>", "▁▁"])
    assert vocabulary.bytes_of(ids["▁the"]) == b" the"
    assert vocabulary.bytes_of(ids["▁▁"]) == b"  "
    assert b"".join(vocabulary.bytes_of(ids[f"<0x{byte:02X}>"]) for byte in "€".encode()) == "€".encode()


def test_other_tokens_are_their_text() -> None:
    vocabulary, ids = made(decoders.WordPiece(), ["un", "##able"])
    assert vocabulary.bytes_of(ids["un"]) == b"un"
    without, ids = made(None, ["ü"])
    assert without.bytes_of(ids["ü"]) == "ü".encode()
