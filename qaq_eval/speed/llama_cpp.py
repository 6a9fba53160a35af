"""llama.cpp as a baseline for decode speed, through the low-level API of llama-cpp-python, if it is installed."""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from numpy.ctypeslib import as_array

from qaq_core.base.errors import ConfigError

PREFIX = "llama.cpp-"
CACHES = {f"{PREFIX}f16": "F16", f"{PREFIX}q8_0": "Q8_0", f"{PREFIX}q4_0": "Q4_0"}
"""Types of its KV cache, the same for keys and values."""
_CHUNK = 512
"""Maximum number of tokens per call."""


class LlamaCpp:
    """A batch of sequences of one length that llama.cpp decodes from a GGUF file, with torch's number of threads.

    Args:
        kind: one of CACHES.
        tokens: maximum length of a sequence.
    Raises:
        ConfigError: llama.cpp is not installed, the model is not a GGUF file, or llama.cpp cannot load it.
    """

    def __init__(self, model: str, kind: str, batch: int, tokens: int) -> None:
        if kind not in CACHES:
            raise ConfigError(f"unknown cache {kind!r} of llama.cpp; take {', '.join(CACHES)}")
        self._api = api = _library()
        if not model.endswith(".gguf"):
            raise ConfigError(f"{kind} decodes from a .gguf file, which {model} is not")
        self._model = self._context = None
        self._batch = api.llama_batch_init(batch * _CHUNK, 0, 1)
        self._sequences, self._length = batch, 0
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(model.encode(), options)
        if not self._model:
            raise ConfigError(f"llama.cpp cannot load {model}")
        wanted = api.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = batch * -(-tokens // 256) * 256, batch
        wanted.n_batch = batch * _CHUNK
        wanted.n_threads = wanted.n_threads_batch = torch.get_num_threads()
        wanted.type_k = wanted.type_v = getattr(api, f"GGML_TYPE_{CACHES[kind]}")
        if CACHES[kind] != "F16":  # llama.cpp reads quantized values in flash attention only
            wanted.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = api.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise ConfigError(f"llama.cpp makes no {kind} cache of {batch} x {tokens} tokens for {model}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """Computes the next tokens, int64 [batch, n]. Returns the logits [batch, vocabulary] after the last ones."""
        for chunk in ids.split(_CHUNK, 1):
            self._compute(chunk.tolist())
        self._api.llama_synchronize(self._context)
        vocabulary = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        last = self._batch.n_tokens // self._sequences
        rows = [self._api.llama_get_logits_ith(self._context, (i + 1) * last - 1) for i in range(self._sequences)]
        return torch.stack([torch.from_numpy(as_array(row, (vocabulary,)).copy()) for row in rows])

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences in its saved form: rows, and a few bytes per token."""
        return sum(self._api.llama_state_seq_get_size(self._context, i) for i in range(self._sequences))

    def close(self) -> None:
        """Frees everything."""
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        self._context = self._model = self._batch = None

    def _compute(self, rows: list[list[int]]) -> None:
        batch, at = self._batch, 0
        for i, row in enumerate(rows):
            for j, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, self._length + j
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, i
                batch.logits[at] = j == len(row) - 1
                at += 1
        batch.n_tokens = at
        if failed := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp failed to decode ({failed})")
        self._length += len(rows[0])


def _library() -> Any:
    """llama.cpp's functions, with its log turned off."""
    try:
        from llama_cpp import llama_cpp as api
    except ImportError as error:
        raise ConfigError(
            "llama.cpp is not installed; pip install llama-cpp-python (it compiles for ten minutes or more)"
        ) from error
    api.llama_log_set(_silent(api), None)
    api.llama_backend_init()
    return api


@cache
def _silent(api: Any) -> Any:
    """A log callback that does nothing. It is cached because it must outlive the library."""
    return api.llama_log_callback(lambda level, text, data: None)
