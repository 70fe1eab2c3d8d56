"""Random adds, aborts, resumptions and steps over a pool that is too small for them.

The oracle is a few lines: what each choice yields when nothing else exists.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.errors import OverloadedError
from serve.messages import GenerateRequest, NewSequence
from serve.seeds import choice_seed
from serve.testing.drive import Receiver, generate_request
from serve.testing.slot_runner import Chosen, SlotRunner, hash_tokens

EOS = 1
BLOCK_SIZE = 2
NUM_BLOCKS = 10
NUM_SLOTS = BLOCK_SIZE * NUM_BLOCKS
MAX_MODEL_LEN = 24


def next_token(token_ids: list[int], seed: int) -> int | None:
    """The pure model: None for one poisoned state in 97."""
    number = hash_tokens(token_ids, seed)
    return None if number % 97 == 0 else 1 + number % 23


def choose(new: NewSequence, token_ids: list[int], mask: np.ndarray | None) -> Chosen:
    token_id = next_token(token_ids, new.sampling.seed)
    error = "poisoned" if token_id is None else None
    return Chosen(token_id or 0, None, error)


def undisturbed(prompt: list[int], seed: int, max_tokens: int) -> tuple[list[int], str]:
    token_ids = list(prompt)
    while True:
        token_id = next_token(token_ids, seed)
        if token_id is None:
            return token_ids[len(prompt) :], "error"
        token_ids.append(token_id)
        if token_id == EOS:
            return token_ids[len(prompt) :], "stop"
        if len(token_ids) >= min(len(prompt) + max_tokens, MAX_MODEL_LEN, NUM_SLOTS + 1):
            return token_ids[len(prompt) :], "length"


prompts = st.lists(
    st.lists(st.integers(2, 40), min_size=1, max_size=NUM_SLOTS), min_size=1, max_size=2
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        max_running=st.integers(1, 6), budget=st.integers(2, 24), max_waiting=st.integers(0, 8)
    )
    def start(self, max_running: int, budget: int, max_waiting: int) -> None:
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
            ),
            clock=lambda: 0.0,
        )
        self.receiver = Receiver()
        self.requests: dict[int, GenerateRequest] = {}
        self.aborted: set[int] = set()

    @rule(
        prompts=prompts,
        n=st.integers(1, 3),
        seed=st.integers(0, 9),
        max_tokens=st.integers(0, 16),
        share=st.just(0.0) | st.floats(0, 1),
    )
    def add(
        self, prompts: list[list[int]], n: int, seed: int, max_tokens: int, share: float
    ) -> None:
        """`share` of the first prompt's undisturbed output was already sent by an earlier try."""
        if max_tokens == 0:
            share = 0.0
        sent = None
        if share > 0:
            prompts = prompts[:1]
            outputs = [
                undisturbed(prompts[0], choice_seed(seed, i), max_tokens)[0] for i in range(n)
            ]
            sent = [output[: round(share * len(output))] for output in outputs]
        request = generate_request(
            len(self.requests),
            *prompts,
            n=n,
            output_token_ids=sent,
            seed=seed,
            max_tokens=max_tokens,
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
        for _ in range(num_steps):
            self.receiver.take(self.engine.step())
            self.engine.check_integrity()
            assert self.runner.max_step_tokens <= self.budget

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
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
                seed = choice_seed(request.sampling.seed, index % request.n)
                expected, reason = undisturbed(prompt.token_ids, seed, request.sampling.max_tokens)
            if choice.finish_reason == "abort":
                assert stream_id in self.aborted
                assert received == expected[: len(received)]
            else:
                assert (received, choice.finish_reason) == (expected, reason)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
