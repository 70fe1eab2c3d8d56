"""What will run where, how much of it fits and how fast it will be, before anything starts.

Not reading the user's file (`cluster.plan`) and not starting anything. The one decision: all that
depends on the machine is passed in as data (a `Machine`, a `Hardware`), so the same file gives the
same plan in a test, on a laptop and for a cluster that nobody has yet.
"""

from __future__ import annotations

from .local import check_local, explain
from .machine import Machine
from .prediction import Prediction, predict, with_predictions
from .resolution import resolve

__all__ = [
    "Machine",
    "Prediction",
    "check_local",
    "explain",
    "predict",
    "resolve",
    "with_predictions",
]
