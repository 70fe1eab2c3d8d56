"""Random adds, aborts, resumptions and steps over a pool that is too small for them.

The oracle is a few lines: what each choice yields when nothing else exists. It knows neither
lookahead nor the prefix cache, so both must be without effect on what is told.
"""

from typing import cast

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.engine.engine import Engine
from serve.engine.grammar import GrammarCompiler, GrammarError
from serve.engine.settings import EngineSettings
from serve.errors import OverloadedError
from serve.messages import GenerateRequest, GrammarSpec, NewSequence
from serve.seeds import choice_seed
from serve.testing.drive import Receiver, generate_request
from serve.testing.slot_runner import Chosen, SlotRunner, hash_tokens

EOS = 1
BLOCK_SIZE = 2
NUM_BLOCKS = 10
NUM_SLOTS = BLOCK_SIZE * NUM_BLOCKS
MAX_MODEL_LEN = 24
NUM_IDS = 24


class PureMatcher:
    """A grammar: the residue modulo 3 of each token follows from those before it.

    It ends after as many tokens as `watch` first said, less 2, or 7.
    """

    is_closing = False

    def __init__(self) -> None:
        self.output: list[int] = []
        self.num_watched = 0
        self.num_tokens = 7

    def watch(self, num_left: int) -> None:
        assert self.num_watched == len(self.output), "a position was watched twice or never"
        if not self.output:
            self.num_tokens = max(1, min(7, num_left - 2))
        self.num_watched += 1

    def mask(self) -> np.ndarray:
        assert self.num_watched == len(self.output) + 1
        mask = np.zeros(1, np.uint32)
        for token_id in range(NUM_IDS):
            if self._allows(token_id):
                mask[0] |= np.uint32(1 << token_id)
        return mask

    def consume(self, token_id: int) -> bool:
        if not self._allows(token_id):
            raise GrammarError("not allowed")
        self.output.append(token_id)
        return len(self.output) >= self.num_tokens

    def _allows(self, token_id: int) -> bool:
        return token_id > EOS and token_id % 3 == hash_tokens(self.output, 5) % 3


class PureGrammars:
    def compile(self, spec: GrammarSpec) -> PureMatcher:
        return PureMatcher()


def next_token(token_ids: list[int], seed: int, mask: np.ndarray | None) -> int | None:
    """The pure model: None for one poisoned state in 97."""
    number = hash_tokens(token_ids, seed)
    token_id = 1 + number % (NUM_IDS - 1)
    while mask is not None and not int(mask[0]) >> token_id & 1:
        token_id = (token_id + 1) % NUM_IDS
    return None if number % 97 == 0 else token_id


def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
    token_id = next_token(token_ids, new.sampling.seed, mask)
    return Chosen(token_id or 0, None, "poisoned" if token_id is None else None)


def undisturbed(
    prompt: list[int], seed: int, max_tokens: int, *, has_grammar: bool
) -> tuple[list[int], str]:
    token_ids = list(prompt)
    max_len = min(len(prompt) + max_tokens, MAX_MODEL_LEN, NUM_SLOTS + 1)
    matcher = PureMatcher()
    while True:
        mask = None
        if has_grammar:
            matcher.watch(max_len - len(token_ids))
            mask = matcher.mask()
        token_id = next_token(token_ids, seed, mask)
        if token_id is None:
            return token_ids[len(prompt) :], "error"
        token_ids.append(token_id)
        if token_id == EOS or (has_grammar and matcher.consume(token_id)):
            return token_ids[len(prompt) :], "stop"
        if len(token_ids) >= max_len:
            return token_ids[len(prompt) :], "length"


# Many begin alike, and some are whole beginnings of others.
starts = st.sampled_from([[], [2, 3, 4, 5], [2, 3, 4, 5, 6, 7, 8, 9, 10], [2, 3, 7, 7, 7, 7]])
rests = st.lists(st.integers(2, 40), min_size=1, max_size=NUM_SLOTS - 9)
prompts = st.lists(
    st.builds(lambda start, rest: start + rest, starts, rests), min_size=1, max_size=2
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        max_running=st.integers(1, 6),
        budget=st.integers(2, 24),
        max_waiting=st.integers(0, 8),
        lookahead=st.booleans(),
        prefix_cache=st.booleans(),
    )
    def begin(
        self,
        max_running: int,
        budget: int,
        max_waiting: int,
        lookahead: bool,
        prefix_cache: bool,
    ) -> None:
        self.runner = SlotRunner(NUM_BLOCKS, BLOCK_SIZE, choose)
        self.budget = budget
        self.engine = Engine(
            self.runner,
            EngineSettings(
                max_running_sequences=max_running,
                token_budget=budget,
                max_step_s=1.0,
                max_waiting_requests=max_waiting,
                max_waiting_tokens=200,
                block_size=BLOCK_SIZE,
                num_total_blocks=NUM_BLOCKS,
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=(EOS,),
                lookahead=lookahead,
                prefix_cache=prefix_cache,
            ),
            grammars=cast(GrammarCompiler, PureGrammars()),
            clock=lambda: 0.0,
        )
        self.is_started = False
        self.receiver = Receiver()
        self.requests: dict[int, GenerateRequest] = {}
        self.aborted: set[int] = set()

    @rule(
        prompts=prompts,
        n=st.integers(1, 3),
        seed=st.integers(0, 9),
        max_tokens=st.integers(0, 16),
        share=st.just(0.0) | st.floats(0, 1),
        has_grammar=st.booleans(),
        namespace=st.sampled_from([b"", b"a"]),
    )
    def add(
        self,
        prompts: list[list[int]],
        n: int,
        seed: int,
        max_tokens: int,
        share: float,
        has_grammar: bool,
        namespace: bytes,
    ) -> None:
        """`share` of the first prompt's undisturbed output was already sent by an earlier try."""
        if max_tokens == 0:
            share = 0.0
        sent = None
        if share > 0:
            prompts = prompts[:1]
            outputs = [
                undisturbed(prompts[0], choice_seed(seed, i), max_tokens, has_grammar=has_grammar)[
                    0
                ]
                for i in range(n)
            ]
            sent = [output[: round(share * len(output))] for output in outputs]
        request = generate_request(
            len(self.requests),
            *prompts,
            n=n,
            output_token_ids=sent,
            namespace=namespace,
            seed=seed,
            max_tokens=max_tokens,
            grammar=GrammarSpec("json_object") if has_grammar else None,
        )
        before = self.engine.load()
        try:
            self.engine.add(request)
        except OverloadedError:
            assert self.engine.load() == before
            return
        self.requests[len(self.requests)] = request

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.requests)))
        if stream_id not in self.receiver.summaries:
            self.aborted.add(stream_id)
        self.engine.abort(stream_id)
        self.engine.abort(stream_id)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        self.finish_step()
        for _ in range(num_steps):
            self.receiver.take(self.engine.step())
            self.engine.check_integrity()

    @precondition(lambda self: not self.is_started)
    @rule()
    def start_step(self) -> None:
        self.engine.start_step()
        self.is_started = True

    @rule()
    def take_result(self) -> None:
        self.receiver.take(self.engine.take_result())

    @rule()
    def finish_step(self) -> None:
        if self.is_started:
            self.engine.finish_step()
            self.is_started = False

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            assert self.runner.max_step_tokens <= self.budget

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.finish_step()
        num_sequences = sum(len(r.prompts) * r.n for r in self.requests.values())
        for _ in range(200 * (num_sequences + 1)):
            if not self.engine.has_work:
                break
            self.receiver.take(self.engine.step())
            self.engine.check_integrity()
        assert self.runner.max_step_tokens <= self.budget
        assert not self.engine.has_work, "a sequence starves"
        assert self.engine.load().num_used_blocks == 0
        assert self.receiver.summaries.keys() == self.requests.keys()
        for stream_id, request in self.requests.items():
            self.check(stream_id, request)

    def check(self, stream_id: int, request: GenerateRequest) -> None:
        for index in range(len(request.prompts) * request.n):
            prompt = request.prompts[index // request.n]
            sent = prompt.output_token_ids or [[]] * request.n
            head = sent[index % request.n]
            choice = self.receiver.choices[stream_id, index]
            received = head + choice.token_ids
            assert choice.start == len(head)
            if request.sampling.max_tokens == 0:
                expected, reason = [], "length"
            else:
                expected, reason = undisturbed(
                    prompt.token_ids,
                    choice_seed(request.sampling.seed, index % request.n),
                    request.sampling.max_tokens,
                    has_grammar=request.sampling.grammar is not None,
                )
            if choice.finish_reason == "abort":
                assert stream_id in self.aborted
                assert received == expected[: len(received)]
            else:
                assert (received, choice.finish_reason) == (expected, reason)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
