"""Runs documents through configurations: the prompt once, then the decode of all of them side by side.

The decode is the real one: a token a forward pass, over `SequenceCache`s that pack, look for exceptions and go
back to their originals as they do when serving. It is teacher-forced: every configuration reads the same
tokens, so its distribution after each can be held against full precision's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qaq_core import InProcessOriginals, Method, QAQCache, SequenceCache, make_method
from qaq_core.base.errors import ConfigError
from qaq_eval.quality.documents import Document
from qaq_eval.quality.prompt import Computed, compute
from qaq_eval.quality.record import Measure, Part

Progress = Callable[[str, float], None]
_CONFIG = re.compile(
    r"(?P<name>[^@\[\]]+)(\[(?P<settings>[^\[\]]*)\])?(@(?P<error>e)?(?P<number>\d+(\.\d+)?)(?P<times>x)?)?"
)
_WITHOUT = "-norequant"


@dataclass(frozen=True)
class Config:
    """One configuration: a preset or rival, `-norequant` for no exceptions, settings, and a target.

    `balanced@2.2` holds 2.2 code bits an element after the prompt, `balanced@8x` is 8 times smaller than fp16,
    `balanced@e0.01` is predicted to cost 0.01 nats a token. `paper[statistic=3]` is given a setting of the preset.
    """

    text: str
    preset: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Config:
        found = _CONFIG.fullmatch(text)
        if found is None or (found["error"] and found["times"]):
            raise ConfigError(
                f"{text!r} is no configuration: write a preset or rival, and a target after @, "
                "as in balanced@2.2 (bits), balanced@8x (times smaller) or balanced@e0.01 (nats), "
                "and settings in brackets: paper[attention_window=3]@4x"
            )
        settings = _settings(found["settings"] or "")
        if found["number"]:
            kind = "error" if found["error"] else "compression" if found["times"] else "bits"
            settings[f"target_{kind}"] = float(found["number"])
        name = found["name"]
        if name.endswith(_WITHOUT):
            name, settings["exceptions"] = name.removesuffix(_WITHOUT), False
        return cls(text, name, settings)

    @classmethod
    def parse_all(cls, text: str) -> list[Config]:
        """Several, by comma, each once."""
        names = (name.strip() for name in re.split(r",(?![^\[]*\])", text))
        return [cls.parse(name) for name in dict.fromkeys(names) if name]

    def method(self, model: Any, fingerprint: str | None) -> Method:
        """The configuration's method; the model is switched to QAQ's attention."""
        return make_method(model, fingerprint, self.preset, **self.settings)


def _settings(text: str) -> dict[str, Any]:
    """Settings as keyword arguments are written, words without quotes: `granularity=head, bits=(2, 6)`."""
    try:
        call = ast.parse(f"settings({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or None in {part.arg for part in call.keywords}:
            raise ValueError("every setting needs its name")
        return {
            str(part.arg): part.value.id if isinstance(part.value, ast.Name) else ast.literal_eval(part.value)
            for part in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"[{text}] are no settings ({error}): write them as in [granularity=head]") from error


@torch.no_grad()
def evaluate(
    model: Any,
    fingerprint: str | None,
    documents: Sequence[Document],
    configs: Sequence[Config],
    done: Callable[[int, str], bool] = lambda index, config: False,
    progress: Progress | None = None,
) -> Iterator[Part]:
    """What each configuration made of each document, as it is known.

    Args:
        done: tells whether the document's index and the configuration need not be run again.
        progress: called with what is being done and the share of all that is done.
    Raises:
        ConfigError, UnsupportedModelError.
    """
    methods = {config.text: config.method(model, fingerprint) for config in configs}
    report = progress or (lambda what, share: None)
    total = len(documents)
    for i, document in enumerate(documents):
        pending = {text: method for text, method in methods.items() if not done(document.index, text)}
        if not pending:
            continue
        report(f"document {i + 1} of {total}: prompt", i / total)
        computed = compute(model, next(iter(pending.values())), document, [m.statistic for m in pending.values()])
        measures = [
            Measure(document.index, text, sequence)
            for text, sequence in prefilled(document.context, computed, pending).items()
        ]
        for step in range(document.decode):
            if step % 8 == 0:
                report(f"document {i + 1} of {total}: decode", (i + step / document.decode) / total)
            decode_step(model, document.ids, document.context + step, computed.log_probabilities[step], measures)
        for measure in measures:
            yield measure.part()
            measure.sequence.close()
    report("done", 1.0)


_Key = TypeVar("_Key", bound=Hashable)


def prefilled(context: int, computed: Computed, methods: Mapping[_Key, Method]) -> dict[_Key, SequenceCache]:
    """A sequence per key, of its method, that has just ended the prompt. They share the prompt's originals."""
    originals = InProcessOriginals()
    sequences = {}
    for key, method in methods.items():
        shared = context // method.page_tokens

        def name(page: int, key: _Key = key, shared: int = shared) -> bytes:
            return f"{page} {'prompt' if page < shared else key}".encode()

        sequences[key] = method.sequence(originals, name)
        sequences[key].load_prefill(computed.originals, computed.watch(method.statistic))
    return sequences


def decode_step(model: Any, ids: torch.Tensor, at: int, exact: torch.Tensor, measures: Sequence[Measure]) -> None:
    """Decodes the token at a position with every sequence, and measures what each predicts after it.

    Args:
        exact: full precision's log probabilities [vocabulary] of the token after it.
    """
    count = len(measures)
    logits = model(
        input_ids=ids[at].to(exact.device).expand(count, 1),
        position_ids=torch.full((count, 1), at, device=exact.device),
        past_key_values=QAQCache([measure.sequence for measure in measures]),
    ).logits[:, -1]
    for got, measure in zip(logits.float().log_softmax(-1), measures, strict=True):
        measure.add(exact, got, int(ids[at + 1]))
