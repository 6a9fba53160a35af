"""Allocation: how many bits each vector gets, from the attention its token has had."""

from qaq_core.allocation.allocator import Allocator, TokenState, WidthChanges
from qaq_core.allocation.attention_statistics import (
    AttentionStatistic,
    AttentionWindow,
    DecayingMeanSquare,
    LayerObserver,
    NoObserver,
    NoStatistic,
    Observer,
    PromptMeans,
    PromptObserver,
    Reduction,
    StepObserver,
)
from qaq_core.allocation.importance import Importance
from qaq_core.allocation.policies import BalancedPolicy, ErrorPolicy, FixedPolicy, PaperPolicy, Policy, View
from qaq_core.allocation.rate_control import RateControl
from qaq_core.allocation.requantize import Requantizer
from qaq_core.allocation.step_error import Found, StepError, StepErrors
from qaq_core.allocation.target import Target

__all__ = [
    "Allocator",
    "AttentionStatistic",
    "AttentionWindow",
    "BalancedPolicy",
    "DecayingMeanSquare",
    "ErrorPolicy",
    "FixedPolicy",
    "Found",
    "Importance",
    "LayerObserver",
    "NoObserver",
    "NoStatistic",
    "Observer",
    "PaperPolicy",
    "Policy",
    "PromptMeans",
    "PromptObserver",
    "RateControl",
    "Reduction",
    "Requantizer",
    "StepError",
    "StepErrors",
    "StepObserver",
    "Target",
    "TokenState",
    "View",
    "WidthChanges",
]
