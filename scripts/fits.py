"""Writes configs/fits.yaml: every preset model on every preset of hardware, from the planner.

Run it (`python -m scripts.fits`) after a change to configs/ or to the planner; a test compares.
"""

from __future__ import annotations

import yaml

from cluster.plan import configs_path
from cluster.planner.fits import all_fits

HEADER = """\
# Written by `python -m scripts.fits` from the planner: do not edit. What each model of
# configs/models needs on each preset of configs/hardware, by tensor-parallel size; the chart only
# looks it up. max_model_len is the longest of 131,072 (by YaRN, where the KV cache holds four such
# sequences), the model's own positions, 32,768, 16,384, 8,192 and 4,096 that the KV cache holds.
"""


def render() -> str:
    """The file's text."""
    return HEADER + yaml.safe_dump(all_fits(), sort_keys=False, width=1000)


def main() -> None:
    path = configs_path() / "fits.yaml"
    path.write_text(render(), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
