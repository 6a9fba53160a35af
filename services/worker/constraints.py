"""Constraints on generated text: grammars, compiled by xgrammar, and the masks that they put on the logits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from qaq.v1 import common_pb2
from transformers import LogitsProcessor

from qaq_core.models import LoadedModel
from services.common import constraints
from services.common.errors import RETRY_AFTER_MS, FailedPrecondition, InvalidArgument, ResourceExhausted
from services.common.turns import LateError, Turns
from services.worker.json_schema import not_enforced, schemas

CACHE_BYTES = 64 << 20
"""Compiled grammars that are kept. The least recently used ones are dropped."""

COMPILE_THREADS = 2

COMPILE_TIMEOUT_S = 30.0
"""How long a grammar waits for a thread, and how long it may be compiled."""

MAX_WAITING = 64
"""Grammars that wait for a thread."""

MAX_GIVEN_UP = 256
"""Constraints that took too long, and are not compiled again."""

MASK_GRACE_S, MASK_S = 1.0, 0.02
"""Processor time that the masks of a text may take: at once, and for each token. All sequences wait for it."""

MAX_WHITESPACE = 32
"""Whitespace characters in a row outside the strings of a JSON text. A small model may write nothing else."""

# What xgrammar puts before a message: time, file and line of its own source.
_PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: \(.*?\) is false: ")

# For each byte of a bit mask, what is added to the logits of its eight tokens. Adding is the fastest way to mask.
_PENALTIES = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -np.inf)
_PENALTIES = _PENALTIES.astype(np.float32)

Grammar = Any
"""A compiled grammar: xgrammar.CompiledGrammar. It is shared by all generations with its constraint."""


class Grammars:
    """Compiles constraints for one model, in threads of their own: a grammar may take seconds, and running generations
    must not wait for it. Tenants take turns. Compiled grammars are cached.

    Nothing can stop a compilation. One that takes too long keeps its thread, until it ends or the process does, and its
    constraint is refused from then on; other grammars have other threads, but for two such ones they are refused too.

    Args:
        vocabulary: number of logits.
    """

    def __init__(self, loaded: LoadedModel, vocabulary: int) -> None:
        self._loaded, self._vocabulary = loaded, vocabulary
        self._turns = Turns("grammars", COMPILE_THREADS, MAX_WAITING, COMPILE_TIMEOUT_S)
        self._given_up: dict[bytes, None] = {}  # hashes
        self._compilers: dict[bool, Any] = {}
        self._making = threading.Lock()

    def prepare(self) -> None:
        """Reads the vocabulary, which holds the interpreter's lock for a moment, so that no call has to. Does nothing
        if constraints cannot be served."""
        with contextlib.suppress(FailedPrecondition):
            for special_tokens in (False, True):
                self._compiler(special_tokens)

    async def get(self, constraint: common_pb2.Constraint, tenant: str = "") -> Grammar | None:
        """The grammar of a constraint; None if it has no kind.

        Raises:
            InvalidArgument: it is over a limit, or cannot be compiled; the message has xgrammar's reason.
            ResourceExhausted: it takes too long, or too many others do.
            FailedPrecondition: xgrammar is not installed, or the model has no end-of-sequence token.
        """
        if constraint.WhichOneof("kind") is None:
            return None
        name = hashlib.sha256(constraint.SerializeToString(deterministic=True)).digest()
        if name in self._given_up:
            raise _too_slow()
        try:
            return await self._turns.run(tenant, lambda: self._compile(constraint))
        except LateError as error:
            self._given_up[name] = None
            if len(self._given_up) > MAX_GIVEN_UP:
                del self._given_up[next(iter(self._given_up))]
            raise _too_slow() from error
        except TimeoutError as error:
            raise ResourceExhausted(
                f"the constraint's turn to be compiled did not come within {COMPILE_TIMEOUT_S:g} s; try again later",
                retry_after_ms=RETRY_AFTER_MS,
            ) from error

    def _compile(self, constraint: common_pb2.Constraint) -> Grammar:
        kind = constraint.WhichOneof("kind")
        constraints.check(constraint)
        _check_schemas(constraint)
        compiler = self._compiler(special_tokens=kind == "structural_tag")
        try:
            match kind:
                case "json_schema":
                    return compiler.compile_json_schema(constraint.json_schema, max_whitespace_cnt=MAX_WHITESPACE)
                case "json_object":
                    return compiler.compile_json_schema(
                        '{"type": "object", "additionalProperties": true}', max_whitespace_cnt=MAX_WHITESPACE
                    )
                case "regex":
                    return compiler.compile_regex(constraint.regex)
                case "grammar":
                    return compiler.compile_grammar(constraint.grammar)
                case "choice":
                    return compiler.compile_structural_tag(_choice(constraint.choice.texts))
                case _:
                    return compiler.compile_structural_tag(constraint.structural_tag)
        except (RuntimeError, ValueError, TypeError) as error:  # xgrammar has no error of its own for most faults
            raise InvalidArgument(f"constraint.{kind} cannot be compiled: {_reason(error)}") from error

    def _compiler(self, special_tokens: bool) -> Any:
        """The compiler of grammars in which special tokens stand for their text, or occur nowhere."""
        if not self._loaded.eos_token_ids:
            raise FailedPrecondition("this model has no end-of-sequence token, which a constraint needs; send none")
        with self._making:
            if special_tokens not in self._compilers:
                xgrammar = _xgrammar()
                tokenizer = _tokenizer_info(xgrammar, self._loaded, self._vocabulary, special_tokens)
                self._compilers[special_tokens] = xgrammar.GrammarCompiler(
                    tokenizer, max_threads=1, cache_limit_bytes=CACHE_BYTES
                )
            return self._compilers[special_tokens]


class GrammarMask(LogitsProcessor):
    """Where one choice is in its grammar. As a logits processor, it rules out the tokens that would leave it.

    The state depends on the accepted tokens alone, so it is rebuilt from a token log.

    Args:
        vocabulary: number of logits.
    """

    def __init__(self, grammar: Grammar, eos: Sequence[int], vocabulary: int) -> None:
        xgrammar = _xgrammar()
        self._matcher = xgrammar.GrammarMatcher(grammar, override_stop_tokens=list(eos))
        self._bits = xgrammar.allocate_token_bitmask(1, vocabulary).numpy()
        self._bytes = self._bits.view(np.uint8)[0]
        self._penalties = np.zeros((len(self._bytes), 8), np.float32)  # 0 for allowed tokens, -inf for the others
        self._penalty = torch.from_numpy(self._penalties).view(-1)[:vocabulary]
        self._filled: Future[None] | None = None
        self._spent_s = 0.0
        self._tokens = 0

    def accept(self, token: int) -> None:
        """Moves on by one generated token.

        Raises:
            InvalidArgument: the grammar does not allow it here.
        """
        if not self._matcher.accept_token(token):
            raise InvalidArgument(f"token {token} does not fit the constraint; send the tokens that were generated")

    def prepare(self) -> None:
        """Computes the mask of the next token. Takes microseconds for most grammars, and milliseconds for some."""
        begun = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._bits)
        np.take(_PENALTIES, self._bytes, axis=0, out=self._penalties, mode="clip")
        self._spent_s += time.thread_time() - begun
        self._tokens += 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: float32 [1, vocabulary]; returns new ones, in which all other tokens have -inf."""
        if self._filled is None:
            self.prepare()
        else:
            self._filled.result()
            self._filled = None
        if self._spent_s > MASK_GRACE_S + MASK_S * self._tokens:
            raise InvalidArgument(
                f"the constraint takes too long to follow: {self._spent_s:.1f} s for {self._tokens} tokens; write one "
                "with fewer ways to read a text"
            )
        penalty = self._penalty.to(scores.device)
        if bool(penalty.max() == -torch.inf):
            raise InvalidArgument("no text fits the constraint; write one that some text fits")
        masked = scores + penalty
        # What is allowed may have been ruled out before, such as the end of the text by a minimum length: the grammar
        # wins.
        return penalty[None] if bool(masked.max() == -torch.inf) else masked


class MaskThread:
    """Computes masks while the device computes the logits that they are for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")

    def prepare(self, masks: Sequence[GrammarMask]) -> None:
        """Begins to compute the next masks. Each mask waits for it when it is applied."""
        if not masks:
            return
        filled = self._thread.submit(_prepare, masks)
        for mask in masks:
            mask._filled = filled


def _prepare(masks: Sequence[GrammarMask]) -> None:
    for mask in masks:
        mask.prepare()


def _too_slow() -> ResourceExhausted:
    return ResourceExhausted(f"the constraint was not compiled within {COMPILE_TIMEOUT_S:g} s; simplify it")


def _xgrammar() -> Any:
    """Raises:
    FailedPrecondition: it is not installed.
    """
    try:
        import xgrammar
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            "constraints need xgrammar, which this worker lacks; install it: pip install 'qaq-kv[constraints]'"
        ) from error
    return xgrammar


def _tokenizer_info(xgrammar: Any, loaded: LoadedModel, vocabulary: int, special_tokens: bool) -> Any:
    """The vocabulary as xgrammar sees it. A token without text occurs in no grammar."""
    tokenizer, eos = loaded.tokenizer, list(loaded.eos_token_ids)
    found = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocabulary, stop_token_ids=eos)
    if special_tokens:
        return found
    texts = [""] * vocabulary
    for text, token in tokenizer.get_vocab().items():
        if token < vocabulary:
            texts[token] = text
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special and token < vocabulary:
            texts[token] = ""
    return xgrammar.TokenizerInfo(
        texts, found.vocab_type, vocab_size=vocabulary, stop_token_ids=eos, add_prefix_space=found.add_prefix_space
    )


def _check_schemas(constraint: common_pb2.Constraint) -> None:
    """Raises:
    InvalidArgument: a JSON schema has a part that would not be enforced.
    """
    kind = constraint.WhichOneof("kind")
    try:
        if kind == "json_schema":
            found = not_enforced(json.loads(constraint.json_schema))
        elif kind == "structural_tag":
            found = not_enforced(schemas(json.loads(constraint.structural_tag)))
        else:
            return
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"constraint.{kind} is not JSON, or nested too deeply: {error}") from error
    if found is not None:
        raise InvalidArgument(f"constraint.{kind}: {found}")


def _choice(texts: Sequence[str]) -> str:
    """One of several texts, as a structural tag."""
    elements = [{"type": "const_string", "value": text} for text in texts]
    return json.dumps({"type": "structural_tag", "format": {"type": "or", "elements": elements}})


def _reason(error: Exception) -> str:
    """The first line of xgrammar's message, without the place in its source."""
    lines = _PLACE.sub("", str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
