"""Bit policies: how many bits each vector should hold. One file per policy."""

from qaq_core.allocation.policies.balanced import BalancedPolicy
from qaq_core.allocation.policies.base import ErrorPolicy, Policy, View
from qaq_core.allocation.policies.fixed import FixedPolicy
from qaq_core.allocation.policies.paper import PaperPolicy

__all__ = ["BalancedPolicy", "ErrorPolicy", "FixedPolicy", "PaperPolicy", "Policy", "View"]
