"""Documents: token ids to evaluate, a prompt and its teacher-forced continuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.base.errors import ConfigError

RECALL_START = 1 / 8
"""Where in the prompt the repeated passage begins: far from the end, and after the sinks."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        ids: int64 [context + decode + 1]; the last token is only predicted.
        context: tokens of the prompt.
    """

    index: int
    ids: torch.Tensor
    context: int

    @property
    def decode(self) -> int:
        return len(self.ids) - self.context - 1


def builtin_text() -> str:
    """English text that is a part of Python: the topics of its reference, about 160,000 tokens."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def cut_documents(
    text: str, tokenizer: Any, context: int, decode: int, documents: int, offset_fraction: float = 0.0
) -> list[Document]:
    """Consecutive documents of a text that do not overlap, from `offset_fraction` of the text on.

    Raises:
        ConfigError: the text is too short; the message says how many documents it has.
    """
    if context < 2 or decode < 1 or documents < 1:
        raise ConfigError("context must be at least 2 tokens, decode and documents at least 1")
    if not 0 <= offset_fraction < 1:
        raise ConfigError(f"the offset must be at least 0 and below 1, not {offset_fraction}")
    begin = torch.tensor(bos_tokens(tokenizer), dtype=torch.long)
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    encoded = encoded[int(len(encoded) * offset_fraction) :]
    size = context + decode + 1
    text_size = size - len(begin)
    if documents * text_size > len(encoded):
        raise ConfigError(
            f"the text has {len(encoded) // text_size} documents of {size} tokens after the offset, not {documents}: "
            "take fewer or shorter documents, a smaller offset, or a longer text"
        )
    parts = [encoded[i * text_size : (i + 1) * text_size] for i in range(documents)]
    return [Document(i, torch.cat([begin, part]), context) for i, part in enumerate(parts)]


def with_recall(document: Document) -> Document:
    """The same prompt, followed by a passage from far back in it, word for word."""
    start, size = int(document.context * RECALL_START), document.decode + 1
    if start + 2 * size > document.context:
        raise ConfigError(f"a prompt of {document.context} tokens is too short to repeat {size} tokens of it")
    passage = document.ids[start : start + size]
    return Document(document.index, torch.cat([document.ids[: document.context], passage]), document.context)


def bos_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token if the tokenizer adds one to a prompt, else nothing."""
    special = tokenizer("").input_ids
    return [special[0]] if special and special[0] == tokenizer.bos_token_id else []
