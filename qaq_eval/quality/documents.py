"""Documents: the token ids that are evaluated, a prompt and what the decode is made to say after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qaq_core.base.errors import ConfigError

RECALL_AT = 1 / 8
"""Where in the prompt the passage begins that is repeated: far back, and not among the sinks."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        ids: int64 [context + decode + 1]; the last one is only predicted.
        context: tokens of the prompt.
    """

    index: int
    ids: torch.Tensor
    context: int

    @property
    def decode(self) -> int:
        return len(self.ids) - self.context - 1


def builtin_text() -> str:
    """English that every Python brings: the topics of its reference, about 160,000 tokens."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def cut(
    text: str, tokenizer: Any, context: int, decode: int, documents: int, offset_fraction: float = 0.0
) -> list[Document]:
    """Consecutive documents of a text, from `offset_fraction` of it on, that do not overlap.

    Raises:
        ConfigError: the text is too short; says how many documents it has.
    """
    if context < 2 or decode < 1 or documents < 1:
        raise ConfigError("context must be at least 2 tokens, decode and documents at least 1")
    if not 0 <= offset_fraction < 1:
        raise ConfigError(f"the offset must be from 0 to under 1, not {offset_fraction}")
    first = _first_ids(tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    encoded = encoded[int(len(encoded) * offset_fraction) :]
    size = context + decode + 1
    own = size - len(first)
    if documents * own > len(encoded):
        raise ConfigError(
            f"the text has {len(encoded) // own} documents of {size} tokens from there on, not {documents}: "
            "take fewer or shorter ones, an earlier offset, or a longer text"
        )
    parts = [encoded[i * own : (i + 1) * own] for i in range(documents)]
    return [Document(i, torch.cat([first, part]), context) for i, part in enumerate(parts)]


def with_recall(document: Document) -> Document:
    """The same prompt, after which the decode repeats a passage from far back in it word for word."""
    start, size = int(document.context * RECALL_AT), document.decode + 1
    if start + 2 * size > document.context:
        raise ConfigError(f"a prompt of {document.context} tokens is too short to repeat {size} tokens of it")
    passage = document.ids[start : start + size]
    return Document(document.index, torch.cat([document.ids[: document.context], passage]), document.context)


def _first_ids(tokenizer: Any) -> torch.Tensor:
    """The beginning-of-text token, where the tokenizer puts one."""
    special = tokenizer("").input_ids
    starts = [special[0]] if special and special[0] == tokenizer.bos_token_id else []
    return torch.tensor(starts, dtype=torch.long)
