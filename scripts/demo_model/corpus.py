"""The corpus: prompts as the server will see them, and the answers to learn.

An endless, seeded stream. Each sample is one prompt (chat or raw text) and one answer; the network
is only taught the answer. The one decision: variety is in the questions, answers have one wording.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .chat import END, ChatTemplate, Message
from .material import TONGUES, compact, load_material, load_phrasing, load_tools
from .question import Exchange, Questions
from .tool_call import ToolCalls

_LAST_SIGNS = "?.!\uff1f\u3002\uff01"


@dataclass(frozen=True, slots=True)
class Sample:
    """`prompt` is read, `answer` is learned (its end token included)."""

    kind: str
    prompt: str
    answer: str


class Corpus:
    """An endless stream of samples; two with one seed are equal."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self._chat = ChatTemplate()
        material = load_material()
        self._phrasing = load_phrasing()
        self._questions = Questions(material, self._phrasing)
        self._tools = ToolCalls(load_tools(), material.unknown)

    def __iter__(self) -> Iterator[Sample]:
        while True:
            yield self.draw()

    def draw(self) -> Sample:
        kinds: dict[str, tuple[float, Callable[[], Sample]]] = {
            "shoal": (30, lambda: self._chatted("shoal", self._questions.shoal)),
            "algorithm": (18, lambda: self._chatted("algorithm", self._questions.algorithm)),
            "algorithm_json": (5, self._raw_json),
            "language": (19, lambda: self._chatted("language", self._questions.language)),
            "small_talk": (9, lambda: self._chatted("small_talk", self._questions.small_talk)),
            "unknown": (12, lambda: self._chatted("unknown", self._questions.unknown)),
            "in_json": (3, lambda: self._chatted("in_json", self._questions.in_json)),
            "forced_json": (3, self._forced_json),
            "tool": (3, self._tool),
        }
        weights = [weight for weight, _ in kinds.values()]
        _, make = self._rng.choices(list(kinds.values()), weights)[0]
        return make()

    def _chatted(self, kind: str, ask: Callable[[Random], Exchange]) -> Sample:
        exchange = self._dress(ask(self._rng))
        if self._rng.random() < 0.1:
            return Sample(kind, exchange.question, exchange.answer + END)
        return Sample(kind, self._prompt(exchange), exchange.answer + END)

    def _raw_json(self) -> Sample:
        exchange = self._questions.algorithm_json(self._rng)
        if self._rng.random() < 0.25:
            return Sample("algorithm_json", self._prompt(exchange), exchange.answer + END)
        ending = self._rng.choice(("", "", "", "\n"))
        return Sample("algorithm_json", exchange.question + ending, exchange.answer + END)

    def _forced_json(self) -> Sample:
        """A question that does not ask for JSON, and a grammar that has forced the first token."""
        questions = self._questions
        kind = self._rng.choice((questions.shoal, questions.unknown, questions.small_talk))
        exchange = self._dress(kind(self._rng))
        raw = self._rng.random() < 0.3
        prompt = exchange.question if raw else self._prompt(exchange)
        answer = compact({"answer": exchange.answer})
        return Sample("forced_json", prompt + '{"', answer.removeprefix('{"') + END)

    def _tool(self) -> Sample:
        messages, tools, answer = self._tools.draw(self._rng)
        return Sample("tool", self._chat.render(messages, tools=tools), answer + END)

    def _prompt(self, exchange: Exchange) -> str:
        rng = self._rng
        messages: list[Message] = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": rng.choice(self._phrasing["systems"])})
        if rng.random() < 0.12:
            earlier = rng.choice(
                (self._questions.shoal, self._questions.small_talk, self._questions.language)
            )(rng)
            messages.append({"role": "user", "content": earlier.question})
            messages.append({"role": "assistant", "content": earlier.answer})
        messages.append({"role": "user", "content": exchange.question})
        return self._chat.render(messages)

    def _fill(self, tongue: str, question: str) -> str:
        """Puts a word that changes nothing somewhere into the question."""
        filler: str = self._rng.choice(self._phrasing["fillers"][tongue])
        if tongue == "en":
            words = question.split(" ")
            words.insert(self._rng.randrange(1, len(words) + 1), filler)
            return " ".join(words)
        place = self._rng.randrange(len(question))
        return question[:place] + filler + question[place:]

    def _dress(self, exchange: Exchange) -> Exchange:
        """Adds what people add: a greeting before, thanks after, lower case, a slip of the key."""
        rng, question = self._rng, exchange.question
        if exchange.tongue in TONGUES and len(question) > 6:
            if rng.random() < 0.15:
                question = self._fill(exchange.tongue, question)
            if rng.random() < 0.18:
                question = rng.choice(self._phrasing["before"][exchange.tongue]) + question
            if rng.random() < 0.1:
                question += rng.choice(self._phrasing["after"][exchange.tongue])
            if rng.random() < 0.07:
                place = rng.randrange(1, len(question) - 1)
                question = question[:place] + question[place + 1 :]
        if rng.random() < 0.15:
            question = question.lower()
        if rng.random() < 0.15:
            question = question.rstrip(_LAST_SIGNS)
        return Exchange(exchange.tongue, question, exchange.answer)
