"""Renderings that a reviewer reads: `python -m tests.chart.golden` writes them again."""

from __future__ import annotations

from pathlib import Path

from tests.chart.cases import KEYS, Values
from tests.chart.rendering import render_texts

FOLDER = Path(__file__).parent / "golden"
_WHOLE = ("",)
# Values, and how the paths of templates that are kept end.
GOLDEN: dict[str, tuple[Values, tuple[str, ...]]] = {
    "demo-on-cpu": (
        {**KEYS, "model": {"preset": "demo"}, "hardware": {"preset": "cpu"}},
        _WHOLE,
    ),
    "7b-on-rtx4090d-x4": (
        {**KEYS, "hardware": {"preset": "rtx4090d-x4"}, "weights": {"from": "ephemeral"}},
        ("/rayservice.yaml",),
    ),
    "7b-on-a100-incremental": (
        {
            **KEYS,
            "replicas": {"min": 1, "max": 4},
            "upgrade": {"type": "Incremental", "incremental": {"gatewayClassName": "istio"}},
            "monitoring": {"podMonitor": True},
        },
        ("/rayservice.yaml", "/pvc.yaml", "/podmonitor.yaml"),
    ),
    "edge": (
        {
            **KEYS,
            "model": {"preset": "demo"},
            "hardware": {"preset": "cpu"},
            "expose": {
                "type": "httproute",
                "host": "llm.example",
                "httproute": {"gateway": {"name": "edge"}},
            },
        },
        ("/httproute.yaml", "/service.yaml", "/NOTES.txt"),
    ),
}


def text_of(name: str) -> str:
    """What the file of that name holds."""
    values, kept = GOLDEN[name]
    rendered = render_texts(values)
    return "".join(
        f"---\n# {path.removeprefix('shoal/')}\n{rendered[path].strip()}\n"
        for path in sorted(rendered)
        if path.endswith(kept)
    )


def main() -> None:
    for name in GOLDEN:
        (FOLDER / f"{name}.yaml").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
