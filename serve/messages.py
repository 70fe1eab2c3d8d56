"""What processes say to each other: requests, sampling parameters, steps, tokens, control.

Plain msgspec structs, encoded as msgpack arrays (but for `FinishedOutput`, which stays in its
process); no behaviour beyond construction, no I/O. The one decision behind it: past the ingress
everything is token ids, and every struct here is already valid (the ingress parsed it), so nobody
downstream checks it again.

Four conversations use these structs::

    ingress --GenerateRequest--> replica --Add--> rank 0         one Serve call a request
    ingress <--Hello, TokenFrame-- rank 0, --Abort--> rank 0     the token stream, one frame a step
    replica <--ShardMessage-- shards, --ReplicaMessage--> shards the control socket
    rank 0 --StepInput--> ranks 1..n-1                           the step channel, one frame a step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from serve.errors import ErrorInfo

FinishReason = Literal["stop", "length", "error", "abort"]


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """The constraint on a sequence's text. `source` is empty for `json_object`."""

    kind: Literal["json_object", "json_schema"]
    source: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How one request's tokens are chosen; every default is "off".

    Sampling is a pure function of (logits, these fields, seed, position): see `runner.sampler`.
    `max_tokens` is already cut to what the context allows. `logprobs` is the number of
    alternatives wanted beside the chosen token's own logprob; None means no logprobs at all.
    """

    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: GrammarSpec | None = None


class StreamAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a request's tokens go: the ingress process that asked, and this attempt's epoch.

    `address` lists where that process listens (see `transport.address`); `secret` proves to it
    that the caller got this request; `stream_id` is new for every attempt, in the whole cluster.
    """

    address: str
    secret: bytes
    stream_id: int


NO_STREAM = StreamAddress("", b"", 0)


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    """One prompt of a request.

    `output_token_ids` holds, per choice, the tokens that an earlier attempt already sent (empty
    but for a migrated request). `block_hashes` are the chained hashes of the prompt's full
    blocks of `serve.prefix.HASH_BLOCK_TOKENS` tokens, whatever the request's namespace; none where
    nobody computed them.
    """

    token_ids: list[int]
    block_hashes: list[bytes] = []
    output_token_ids: list[list[int]] = []


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One valid request: `n` sequences for each prompt; choice index = prompt * n + choice.

    Choice i of any prompt samples with hash(seed, i). `namespace` keeps prefix caches of
    different API keys apart. `stream` is set by the dispatcher, anew for every attempt.
    """

    request_id: str
    model: str
    prompts: list[Prompt]
    sampling: SamplingParams
    n: int = 1
    namespace: bytes = b""
    stream: StreamAddress = NO_STREAM


class TopLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A sampled token's logprob and its most likely alternatives, best first."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


# --- the model step ---------------------------------------------------------------------------


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the runner does not know: first scheduled, migrated in, or resumed.

    `slot`, in [0, max_running_sequences), names it until it is released. `token_ids` are prompt
    and output so far; position p of the output is token `num_prompt_tokens + p` and samples with
    uniform(sampling.seed, p). The seed is already this choice's own. `block_ids` is its block table
    so far; its first blocks may hold keys and values of an equal prefix already.
    """

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    block_ids: list[int]


class MoreBlocks(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that extend a known sequence's table."""

    slot: int
    block_ids: list[int]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """A part of a prompt: known tokens [num_computed_tokens, + num_scheduled_tokens) of a sequence.

    `is_sampled` is false for a part that ends before the last known token.
    """

    slot: int
    num_computed_tokens: int
    num_scheduled_tokens: int
    is_sampled: bool


class StepInput(msgspec.Struct, frozen=True, array_like=True):
    """What changes between two steps, the same for every rank.

    The order on arrival: forget `released` (slots of finished, aborted or preempted sequences), add
    `new`, apply `more_blocks`, then run one batch: `decodes`, then `chunks`.

    `decodes` are the slots, int32, of sequences that go on by one token: the runner appends that
    token to its copy and computes it. The tokens are `decode_token_ids`, int32 in the same order;
    empty bytes mean that each is what this runner sampled for that slot in the step before (the
    engine runs one step ahead and does not know them yet). `wants_masks` says that masks come with
    the call that samples. A step may have no rows at all: then it only takes over changes.
    """

    step_id: int
    released: list[int]
    new: list[NewSequence]
    more_blocks: list[MoreBlocks]
    decodes: bytes
    decode_token_ids: bytes
    chunks: list[Chunk]
    wants_masks: bool = False


class StepOutput(msgspec.Struct, frozen=True, array_like=True):
    """What a step sampled, in rows: one for each decode, then one for each chunk that samples.

    `errors` says, by row, why a token is void (its logits are not finite); `logprobs` holds those
    of rows that asked.
    """

    step_id: int
    token_ids: list[int]
    errors: dict[int, str] = {}
    logprobs: dict[int, TopLogprobs] = {}


@dataclass(frozen=True, slots=True)
class FinishedOutput:
    """The output of a step that is over, for those who ask a pending one for its result."""

    output: StepOutput

    def result(self) -> StepOutput:
        """The output, at once."""
        return self.output


# --- the token stream -------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, array_like=True):
    """A replica's load after a step. Totals count since the shards started.

    A block is free, used by a sequence, or cached; `num_cache_query_tokens_total` are tokens looked
    up in the prefix cache, `num_cache_hit_tokens_total` those that need not be computed.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_used_blocks: int = 0
    num_total_blocks: int = 0
    num_prompt_tokens_total: int = 0
    num_generation_tokens_total: int = 0
    num_preemptions_total: int = 0
    num_steps_total: int = 0
    num_cached_blocks: int = 0
    num_evicted_blocks_total: int = 0
    num_cache_query_tokens_total: int = 0
    num_cache_hit_tokens_total: int = 0


class Prediction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the plan expects of one replica: speed by batch size, all sequences of it together."""

    decode_tokens_per_s: dict[str, float]
    ttft_s: float


class ReplicaStats(msgspec.Struct, frozen=True, array_like=True):
    """What a replica says of itself for `/metrics`; its totals survive a rebuild of its shards."""

    model: str
    replica_id: str
    is_ready: bool
    load: Load
    num_rebuilds_total: int = 0
    requests_total: dict[str, int] = {}  # by finish reason
    prediction: Prediction | None = None


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice of one stream.

    `start` is the output position of the first of them. Exactly one delta of a choice has a
    `finish_reason`, its last; with "error", `error` says why. `num_cached_tokens` of the prompt
    were in the prefix cache: said once a prompt, with the first token of its first choice.
    """

    stream_id: int
    index: int
    start: int
    token_ids: list[int]
    logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int = 0


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """First frame of a connection from rank 0 to an ingress."""

    secret: bytes
    replica_id: str


class TokenFrame(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Every token of one step for one ingress; without deltas, a heartbeat."""

    load: Load
    deltas: list[TokenDelta]


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """From ingress to rank 0: nobody reads this stream any more."""

    stream_id: int


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """From rank 0 to an ingress: every stream of this connection ends with this error."""

    error: ErrorInfo


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """First item of the Serve call: which replica answers, and its refusal if it refuses."""

    replica_id: str
    error: ErrorInfo | None = None


# --- the control socket -----------------------------------------------------------------------


class ShardHello(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """First frame of a shard to its replica; rank 0 says where the other ranks find it."""

    secret: bytes
    rank: int
    pid: int
    group_address: str = ""


class ShardProgress(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Where a starting shard is: bytes of weights read so far, of its share in all."""

    rank: int
    phase: Literal["import", "weights", "connect", "warm_up"]
    num_bytes: int = 0
    num_total_bytes: int = 0


class ShardReady(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """The shard takes steps; rank 0's is sent after a real warm-up step over all ranks."""

    rank: int
    num_weight_bytes: int
    num_read_bytes: int
    num_total_blocks: int
    phases_s: dict[str, float]
    kernels: str = ""  # which compute, as "avx2"; empty where no model is loaded


class Admitted(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """Rank 0 took the request: its sequences wait or run."""

    stream_id: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """Rank 0 did not take the request."""

    stream_id: int
    error: ErrorInfo


class Summary(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """A request is over, second item of the Serve call: one finish reason a choice.

    Times count from the engine's admission; `ttft_s` is None where this attempt made no first
    token (a migrated request's came from an earlier one).
    """

    stream_id: int
    finish_reasons: list[FinishReason]
    num_prompt_tokens: int
    num_completion_tokens: int
    error: ErrorInfo | None = None
    duration_s: float = 0.0
    ttft_s: float | None = None


class LoadReport(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """Rank 0's load, at least every heartbeat."""

    load: Load


class ShardFailed(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """The last word of a shard that gives up: its root cause, once."""

    rank: int
    error: ErrorInfo


class ShardBeat(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """From a ready shard, every heartbeat: its process runs."""


class Peers(msgspec.Struct, frozen=True, array_like=True, tag=30):
    """From the replica to a shard, once all said hello: connect to each other."""

    group_address: str


class Add(msgspec.Struct, frozen=True, array_like=True, tag=31):
    """From the replica to rank 0: a new request."""

    request: GenerateRequest


class Drop(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """From the replica to rank 0: end this request with finish reason "abort"."""

    stream_id: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """From the replica to a shard: end."""


StreamMessage = Hello | TokenFrame | Lost
ShardMessage = (
    ShardHello
    | ShardProgress
    | ShardReady
    | Admitted
    | Refused
    | Summary
    | LoadReport
    | ShardFailed
    | ShardBeat
)
ReplicaMessage = Peers | Add | Drop | Shutdown
