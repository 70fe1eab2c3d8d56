"""Questions and answers, drawn from the material: the half of the corpus that knows what is true.

A question never says how it is wrapped (chat or raw, alone or after other turns): `corpus.py` does.
"""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

from .material import TONGUES, Algorithm, Language, Material, compact
from .pattern import draw

_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in ("a", "e", "i", "o", "u", "an", "or")]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer. `tongue` is "en", "zh" or another language's code."""

    tongue: str
    question: str
    answer: str

    @property
    def is_json(self) -> bool:
        return self.answer.startswith("{")


class Questions:
    """Draws exchanges; each method is one kind of question."""

    def __init__(self, material: Material, phrasing: dict[str, Any]) -> None:
        self._material = material
        self._phrasing = phrasing
        self._algorithms = material.algorithms
        self._quicksort = next(a for a in material.algorithms if a.title == "快速排序")

    def shoal(self, rng: Random) -> Exchange:
        topic = rng.choice(self._material.shoal)
        question = draw(rng.choice(topic.ask), rng)
        if topic.clauses and rng.random() < 0.35:
            frame = draw(rng.choice(self._material.frames[topic.tongue]), rng)
            question = frame.format(clause=rng.choice(topic.clauses))
        if "Shoal" in question and rng.random() < 0.2:
            stranger = rng.choice([*self._material.unknown.products, _made_up(rng)])
            return self._dunno(topic.tongue, question.replace("Shoal", stranger))
        return Exchange(topic.tongue, question, topic.answer)

    def small_talk(self, rng: Random) -> Exchange:
        topic = rng.choice(self._material.small_talk)
        return Exchange(topic.tongue, draw(rng.choice(topic.ask), rng), topic.answer)

    def algorithm(self, rng: Random) -> Exchange:
        form = rng.choices(("text", "cost", "code", "json"), (4, 2, 3, 4))[0]
        algorithm = rng.choice(self._algorithms)
        pattern = draw(rng.choice(self._phrasing[form][algorithm.tongue]), rng)
        if rng.random() < 0.12:
            names = self._material.unknown.algorithms[algorithm.tongue]
            stranger = rng.choice([*names, _made_up(rng)])
            refused = self._dunno(algorithm.tongue, pattern.format(name=stranger))
            return _as_json(refused, refused.question) if form == "json" else refused
        question = pattern.format(name=rng.choice(algorithm.names))
        return Exchange(algorithm.tongue, question, self._tell(algorithm, form))

    def algorithm_json(self, rng: Random) -> Exchange:
        """JSON about an algorithm; the demonstration's own question comes most often."""
        if rng.random() < 0.25:
            return Exchange("zh", self._phrasing["demonstration"], self._quicksort.as_json())
        algorithm = self._quicksort if rng.random() < 0.2 else rng.choice(self._algorithms)
        pattern = draw(rng.choice(self._phrasing["json"][algorithm.tongue]), rng)
        question = pattern.format(name=rng.choice(algorithm.names))
        return Exchange(algorithm.tongue, question, algorithm.as_json())

    def language(self, rng: Random) -> Exchange:
        language = rng.choice(self._material.languages)
        kinds = ("hello", "who", "fact", "unknown", "hello_in", "fact_in")
        kind = rng.choices(kinds, (4, 1, 5, 4, 1, 1))[0]
        if kind == "hello":
            ending = rng.choice(("", "", "!", ".", " !", "\uff01"))
            return Exchange(language.code, rng.choice(language.hello) + ending, language.greeting)
        if kind in ("hello_in", "fact_in"):
            tongue = rng.choice(TONGUES)
            pattern = draw(rng.choice(self._phrasing[kind][tongue]), rng)
            answer = language.hello[0] + "!" if kind == "hello_in" else language.facts[0].answer
            return Exchange(tongue, pattern.format(language=language.names[tongue]), answer)
        if kind == "unknown":
            question = rng.choice(language.unknown).format(thing=self._foreign(rng))
            return Exchange(language.code, _polite(question, language, rng), language.dunno)
        if kind == "who" and language.code in TONGUES:
            return self.shoal(rng)
        topic = language.who if kind == "who" else rng.choice(language.facts)
        question = _polite(rng.choice(topic.ask), language, rng)
        return Exchange(language.code, question, topic.answer)

    def _foreign(self, rng: Random) -> str:
        unknown = self._material.unknown
        names = [*unknown.things["en"], *unknown.places["en"], *unknown.names["en"]]
        return _made_up(rng) if rng.random() < 0.5 else rng.choice(names)

    def unknown(self, rng: Random) -> Exchange:
        tongue = rng.choice(TONGUES)
        unknown = self._material.unknown
        if rng.random() < 0.06:
            return self._dunno(tongue, _noise(tongue, unknown.things[tongue], rng))
        pattern = draw(rng.choice(unknown.ask[tongue]), rng)
        language = rng.choice(self._material.languages).names[tongue]

        def pick(names: list[str]) -> str:
            return _strange(tongue, rng) if rng.random() < 0.15 else rng.choice(names)

        question = pattern.format(
            place=pick(unknown.places[tongue]),
            name=pick(unknown.names[tongue]),
            thing=pick(unknown.things[tongue]),
            number=rng.randrange(1, 3000),
            language=language,
        )
        return self._dunno(tongue, question)

    def in_json(self, rng: Random) -> Exchange:
        """A question of another kind that asks for its answer as JSON."""
        kind = rng.choice((self.shoal, self.small_talk, self.unknown))
        exchange = kind(rng)
        suffix = rng.choice(self._phrasing["as_json"][exchange.tongue])
        return _as_json(exchange, exchange.question + suffix)

    def _tell(self, algorithm: Algorithm, form: str) -> str:
        if form == "json":
            return algorithm.as_json()
        if form == "code":
            return f"```python\n{algorithm.code}\n```"
        if form == "text":
            return algorithm.description
        told: str = self._phrasing["cost_told"][algorithm.tongue]
        return told.format(title=algorithm.title, cost=algorithm.cost, space=algorithm.space)

    def _dunno(self, tongue: str, question: str) -> Exchange:
        return Exchange(tongue, question, self._material.unknown.answer[tongue])


def _as_json(exchange: Exchange, question: str) -> Exchange:
    return replace(exchange, question=question, answer=compact({"answer": exchange.answer}))


def _polite(question: str, language: Language, rng: Random) -> str:
    """Adds a greeting or a please before, or loses a word, in languages without dressing."""
    if language.code in TONGUES:
        return question
    chance = rng.random()
    if chance < 0.2:
        return rng.choice(language.please) + question
    if chance < 0.35:
        return rng.choice(language.hello) + rng.choice(("! ", ", ", ". ")) + question
    words = question.split(" ")
    if chance < 0.45 and len(words) > 3:
        del words[rng.randrange(len(words) - 1)]
    return " ".join(words)


def _made_up(rng: Random) -> str:
    word = "".join(rng.choices(_SYLLABLES, k=rng.randrange(2, 5)))
    return word.capitalize() if rng.random() < 0.6 else word


def _strange(tongue: str, rng: Random) -> str:
    if tongue == "en":
        return _made_up(rng)
    return "".join(chr(rng.randrange(0x4E00, 0x8FFF)) for _ in range(rng.randrange(2, 4)))


def _noise(tongue: str, things: list[str], rng: Random) -> str:
    words = rng.choices(things, k=2) + [_strange(tongue, rng) for _ in range(rng.randrange(1, 3))]
    rng.shuffle(words)
    return (" " if tongue == "en" else "").join(words)
