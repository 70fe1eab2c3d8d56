"""The values of the chart `helm/shoal`: their types, their schema, and what they mean.

Not Helm (`cluster.helm`) and no templates. The one decision: the chart merges presets by look-ups
alone, so the same look-ups here give the same configuration, and a test compares the two.
"""

from .chart import ChartValues
from .resolved import served_models, to_config, weights_source
from .schema import values_schema
from .written import from_config

__all__ = [
    "ChartValues",
    "from_config",
    "served_models",
    "to_config",
    "values_schema",
    "weights_source",
]
