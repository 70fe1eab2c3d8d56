"""Brings a rendering of the chart to a cluster and follows it until it serves.

Not the chart, not Helm and not the check before it (`cluster.inventory`). The one decision: what a
change costs (`changes`, `story`) and how a rollout goes (`causes`, `rollout`, `machine`) are pure,
from renderings, snapshots and a clock; `follow` and `release` are thin shells around them.
"""
