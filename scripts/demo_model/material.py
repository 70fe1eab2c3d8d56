"""The material: what the model is to know, read from `knowledge/*.yaml` into typed records.

It holds no phrasing logic; `corpus.py` turns it into questions and answers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "knowledge"
TONGUES = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Topic:
    """One thing to know in one language: the patterns that ask for it and the answer.

    `clauses` are indirect questions ("what Shoal is") for the frames of the material.
    """

    about: str
    tongue: str
    ask: tuple[str, ...]
    answer: str
    clauses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One algorithm in one language."""

    tongue: str
    names: tuple[str, ...]
    description: str
    cost: str
    space: str
    steps: tuple[str, ...]
    code: str

    @property
    def title(self) -> str:
        return self.names[0][:1].upper() + self.names[0][1:]

    def as_json(self) -> str:
        """Compact JSON: no white space between the parts, so that no grammar can stretch it."""
        return compact(
            {
                "name": self.title,
                "description": self.description,
                "complexity": {"time": self.cost, "space": self.space},
                "steps": list(self.steps),
                "code": self.code,
            }
        )


@dataclass(frozen=True, slots=True)
class Language:
    """What the model says in one of the 29 languages.

    `please` goes before a question; `unknown` holds patterns with a `{thing}` to be refused.
    """

    code: str
    names: dict[str, str]
    hello: tuple[str, ...]
    greeting: str
    dunno: str
    facts: tuple[Topic, ...]
    who: Topic
    please: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """Questions outside the material, and the names that fill them."""

    ask: dict[str, tuple[str, ...]]
    answer: dict[str, str]
    places: dict[str, list[str]]
    names: dict[str, list[str]]
    things: dict[str, list[str]]
    algorithms: dict[str, list[str]]
    products: list[str]


@dataclass(frozen=True, slots=True)
class Material:
    """Everything the corpus is written from."""

    shoal: tuple[Topic, ...]
    frames: dict[str, tuple[str, ...]]
    small_talk: tuple[Topic, ...]
    algorithms: tuple[Algorithm, ...]
    languages: tuple[Language, ...]
    unknown: Unknown


def load_material() -> Material:
    """Reads the YAML files of this package."""
    clauses, off_topic = _read("clauses"), _read("off_topic")
    return Material(
        shoal=_topics("shoal", clauses),
        frames={tongue: tuple(clauses["frames"][tongue]) for tongue in TONGUES},
        small_talk=_topics("small_talk", {}),
        algorithms=tuple(_algorithms()),
        languages=tuple(
            _language(entry, off_topic.get(entry["code"], {"please": [], "ask": []}))
            for entry in _read("languages")
        ),
        unknown=_unknown(_read("unknown")),
    )


def load_phrasing() -> dict[str, Any]:
    """Reads the patterns that dress questions, by kind and language."""
    phrasing: dict[str, Any] = _read("phrasing")
    return phrasing


def load_tools() -> list[dict[str, Any]]:
    """Reads the functions of the tool-call examples."""
    tools: list[dict[str, Any]] = _read("tools")
    return tools


def compact(value: object) -> str:
    """JSON without white space between its parts."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _read(name: str) -> Any:
    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _topics(name: str, clauses: dict[str, Any]) -> tuple[Topic, ...]:
    return tuple(
        Topic(
            about=entry["about"],
            tongue=tongue,
            ask=tuple(entry[tongue]["ask"]),
            answer=entry[tongue]["answer"],
            clauses=tuple(clauses.get(entry["about"], {}).get(tongue, ())),
        )
        for entry in _read(name)
        for tongue in TONGUES
    )


def _algorithms() -> list[Algorithm]:
    return [
        Algorithm(
            tongue=tongue,
            names=tuple(entry["names"][tongue]),
            description=entry[tongue]["description"],
            cost=entry["cost"][tongue],
            space=entry["cost"]["space"],
            steps=tuple(entry[tongue]["steps"]),
            code=entry["code"],
        )
        for entry in _read("algorithms")
        for tongue in TONGUES
    ]


def _language(entry: dict[str, Any], off_topic: dict[str, Any]) -> Language:
    code = entry["code"]
    return Language(
        code=code,
        names={tongue: entry[tongue] for tongue in TONGUES},
        hello=tuple(entry["hello"]),
        greeting=entry["greeting"],
        dunno=entry["dunno"],
        facts=tuple(Topic("fact", code, tuple(f["ask"]), f["answer"]) for f in entry["facts"]),
        who=Topic("who", code, tuple(entry["who"]), entry["me"]),
        please=tuple(off_topic["please"]),
        unknown=(*entry["unknown"], *off_topic["ask"]),
    )


def _unknown(entry: dict[str, Any]) -> Unknown:
    return Unknown(
        ask={tongue: tuple(entry[tongue]["ask"]) for tongue in TONGUES},
        answer={tongue: entry[tongue]["answer"] for tongue in TONGUES},
        places=entry["places"],
        names=entry["names"],
        things=entry["things"],
        algorithms=entry["algorithms"],
        products=entry["products"],
    )
