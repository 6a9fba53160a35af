"""What a PromQL query asks for, and whether QAQ's processes have it."""

from __future__ import annotations

import re

from prometheus_client import PROCESS_COLLECTOR, REGISTRY

from services.common import metrics

assert metrics.kv_bytes is not None  # declares all of them

# Of Prometheus itself; and what it adds to every sample.
OTHERS = {"up": set[str]()}
TARGET_LABELS = {"job", "instance"}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
GRAFANAS = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}


def exposed() -> dict[str, set[str]]:
    """Every series that a process of QAQ can expose, with its labels."""
    families = {
        family.name + suffix: labels_of(family.name) | ({"le"} if suffix == "_bucket" else set())
        for family in [*REGISTRY.collect(), *PROCESS_COLLECTOR.collect()]
        for suffix in SUFFIXES.get(family.type, ("",))
    }
    return families | OTHERS


def labels_of(name: str) -> set[str]:
    """The labels of a metric that this package declares."""
    declared = (metric for metric in vars(metrics).values() if getattr(metric, "_name", None) == name)
    return {label for metric in declared for label in metric._labelnames}


def asked(query: str) -> dict[str, set[str]]:
    """The metrics of a query, with the labels that it selects.

    Raises:
        ValueError: it is not PromQL.
    """
    import promql_parser

    for name, value in GRAFANAS.items():
        query = query.replace(name, value)
    found: dict[str, set[str]] = {}
    waiting = [promql_parser.parse(query)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.setdefault(node.name, set()).update(matcher.name for matcher in node.matchers.matchers)
        parts = [getattr(node, part, None) for part in ("expr", "lhs", "rhs", "vector_selector", "param")]
        parts += getattr(node, "args", None) or ()
        waiting += [part for part in parts if isinstance(part, promql_parser.Expr)]
    return found


def grouped(query: str) -> set[str]:
    """The labels by which a query groups."""
    return {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}


def wrong(query: str) -> list[str]:
    """What a query asks for that no process has."""
    known = exposed()
    lost = [name for name in asked(query) if name not in known]
    labels = TARGET_LABELS.union(*(known.get(name, set()) for name in asked(query)))
    lost += [f"label {label}" for label in set.union(grouped(query), *asked(query).values()) - labels]
    return lost
