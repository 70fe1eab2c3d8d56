"""What a cluster has, held against what a rendering of the chart needs, before anything is made.

Not a rollout. The one decision: asking (`facts`) and judging (`preflight`, `capacity`) are apart,
so that every refusal can be tested without a cluster.
"""

from __future__ import annotations

from .capacity import Node, shortages
from .facts import Facts, Operator, gather
from .needs import Needs, PodNeed, needs_of
from .preflight import Problem, check

__all__ = [
    "Facts",
    "Needs",
    "Node",
    "Operator",
    "PodNeed",
    "Problem",
    "check",
    "gather",
    "needs_of",
    "shortages",
]
