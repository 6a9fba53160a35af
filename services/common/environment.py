"""The environment variables of QAQ: which there are, and what is wrong with those that are set."""

from __future__ import annotations

import difflib
import os

from pydantic import ValidationError

from qaq_core.base.errors import ConfigError
from services.common.settings import CommonSettings, GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

PREFIX = "QAQ_"
ROLES: tuple[type[CommonSettings], ...] = (RouterSettings, WorkerSettings, OriginalsSettings, GatewaySettings)
# Those that are no setting of a role.
OTHERS = frozenset(
    {
        "QAQ_API_KEY",
        "QAQ_CACHE_DIR",
        "QAQ_CUDA",
        "QAQ_EMULATE",
        "QAQ_HTTP_PORT",
        "QAQ_KERNEL",
        "QAQ_LIBRARY",
        "QAQ_NVCC",
        "QAQ_STACK",
        "QAQ_STATE_DIR",
        "QAQ_TENANT",
    }
)
# Those that tests read, which may start a stack themselves.
OF_TESTS = frozenset(
    {
        "QAQ_BUDGET_MIB",
        "QAQ_CLIENTS",
        "QAQ_FAULTS",
        "QAQ_FUZZ",
        "QAQ_FUZZ_SEED",
        "QAQ_LLAMA_CPP",
        "QAQ_TRANSFORMERS",
        "QAQ_VLLM",
    }
)
# Variables that are read where torch is imported already, which takes seconds.
CHOICES = {"QAQ_KERNEL": ("auto", "cpu", "cuda", "triton", "reference")}


def variable(setting: str) -> str:
    """The variable of a setting."""
    return PREFIX + setting.upper()


def known() -> frozenset[str]:
    """All variables that have a meaning to QAQ itself."""
    return OTHERS | {variable(name) for role in ROLES for name in role.model_fields}


def unknown() -> dict[str, str | None]:
    """Variables that are set and have no meaning, each with the known one that may be meant."""
    names = known()
    given = (name for name in os.environ if name.upper().startswith(PREFIX))
    found = sorted(name for name in given if name.upper() not in names | OF_TESTS)
    return {name: next(iter(difflib.get_close_matches(name.upper(), names, 1, 0.75)), None) for name in found}


def told(name: str, meant: str | None) -> str:
    """What to say about an unknown variable."""
    advice = f"did you mean {meant}?" if meant else "unset it, or see docs/cluster.md for those that there are"
    return f"{name} means nothing to QAQ; {advice}"


def wrong() -> dict[str, str]:
    """Variables of settings whose values cannot be, each with what is wrong."""
    found: dict[str, str] = {}
    for role in ROLES:
        needed = {"model": "any"} if "model" in role.model_fields and "QAQ_MODEL" not in os.environ else {}
        try:
            role(**needed)  # type: ignore[arg-type]
        except ValidationError as error:
            found |= {variable(str(one["loc"][0])): one["msg"].removeprefix("Value error, ") for one in error.errors()}
    return found


def check() -> None:
    """Checks the variables that are no setting of a role.

    Raises:
        ConfigError: one has a value that cannot be.
    """
    for name, choices in CHOICES.items():
        value = os.environ.get(name, choices[0])
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
