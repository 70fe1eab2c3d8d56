"""What a shared prefix saves, what a long prompt costs others: `python -m scripts.bench.prefix`.

On the real engine without Ray, of the 0.5B's shape. First, requests that share a system prompt:
time to the first token and tokens computed, with the prefix cache and without (every request in a
namespace of its own). Then 8 streams, alone and beside a prompt of 16,384 tokens: the gaps between
their tokens. The bar: the 99th percentile beside it is at most 2.5 times the one alone.

    --quick     two layers and short prompts: does it work?
    --http      the first question once more through a real `shoal up`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from scripts.bench.bars import percentile
from scripts.bench.checkpoint import NUM_TOKENS, bench_checkpoint
from scripts.bench.local_group import GroupOptions, LocalGroup
from scripts.bench.plot_style import LIMIT, OTHER, OURS, PEER, new_figure, save
from scripts.bench.probes import num_cores
from scripts.bench.shoal_run import free_port, machine, run_shoal, write_results
from scripts.bench.streams import run_streams
from serve.engine.ledger import StepResult

BAR = 2.5
NUM_REQUESTS = 6
NUM_STREAMS = 8
_OWN_TOKENS = 64
_STREAM_PROMPT_TOKENS = 32
_FIRST_TOKENS = 2
_WARM_UP_GAPS = 3
# The streams go on while the long prompt is computed, 4 tokens of it a step where it goes slowest,
# and the cache holds all of them until its end.
_STREAM_TOKENS = 8_192
_KV_CACHE_TOKENS = 57_344


def random_ids(seed: str, num_tokens: int) -> list[int]:
    """A prompt that nobody else has."""
    draw = random.Random(seed)
    return [draw.randrange(NUM_TOKENS) for _ in range(num_tokens)]


def shared_prefix(group: LocalGroup, *, prefix_tokens: int, is_cached: bool) -> dict[str, Any]:
    """One request after the other with the same beginning; what each waits and computes."""
    engine = group.engine
    seed = f"prefix/{is_cached}"
    rows = []
    for number in range(NUM_REQUESTS):
        prompt = random_ids(seed, prefix_tokens) + random_ids(f"{seed}/{number}", _OWN_TOKENS)
        namespace = b"" if is_cached else str(number).encode()
        before = engine.load()
        times: list[float] = []

        def take(result: StepResult, times: list[float] = times) -> None:
            if result.deltas:
                times.append(time.perf_counter())

        began = time.perf_counter()
        group.add(prompt, num_tokens=_FIRST_TOKENS, namespace=namespace)
        group.run(take)
        after = engine.load()
        num_hit = after.num_cache_hit_tokens_total - before.num_cache_hit_tokens_total
        rows.append({"ttft_s": times[0] - began, "num_computed_tokens": len(prompt) - num_hit})
    return {
        "requests": rows,
        "first_ttft_s": rows[0]["ttft_s"],
        "next_ttft_s": statistics.median(row["ttft_s"] for row in rows[1:]),
        "next_computed_tokens": statistics.median(row["num_computed_tokens"] for row in rows[1:]),
    }


class _Gaps:
    """Times between the tokens of some streams, in milliseconds."""

    def __init__(self, stream_ids: list[int]) -> None:
        self._last_s: dict[int, float] = {}
        self._watched = set(stream_ids)
        self.milliseconds: list[float] = []

    @property
    def have_all_begun(self) -> bool:
        """Whether every stream has a token."""
        return self._last_s.keys() == self._watched

    def take_all(self) -> list[float]:
        """The gaps since the last call."""
        found, self.milliseconds = self.milliseconds, []
        return found

    def take(self, result: StepResult) -> None:
        """Note what a step told."""
        now = time.perf_counter()
        for delta in result.deltas:
            if delta.stream_id not in self._watched or not delta.token_ids:
                continue
            if (last := self._last_s.get(delta.stream_id)) is not None:
                self.milliseconds.append(1e3 * (now - last))
            self._last_s[delta.stream_id] = now


def beside_long_prompt(group: LocalGroup, *, prompt_tokens: int, num_gaps: int) -> dict[str, Any]:
    """Gaps of the streams alone, then until the long prompt has its first token.

    Alone counts once all of them decode: while they start, each waits for the others' prompts.
    """
    engine = group.engine
    streams = [
        group.add(random_ids(f"stream/{number}", _STREAM_PROMPT_TOKENS), num_tokens=_STREAM_TOKENS)
        for number in range(NUM_STREAMS)
    ]
    gaps = _Gaps(streams)
    while not gaps.have_all_begun:
        _step(group, gaps)
    for _ in range(_WARM_UP_GAPS):
        _step(group, gaps)
    gaps.take_all()
    for _ in range(num_gaps):
        _step(group, gaps)
    alone = gaps.take_all()
    began = time.perf_counter()
    long_stream = group.add(random_ids("long", prompt_tokens), num_tokens=1)
    while long_stream not in {delta.stream_id for delta in _step(group, gaps).deltas}:
        pass
    ttft_s = time.perf_counter() - began
    beside = gaps.take_all()
    for stream_id in streams:
        engine.abort(stream_id)
    group.run(lambda _: None)
    p99_alone, p99_beside = percentile(alone, 0.99), percentile(beside, 0.99)
    return {
        "alone_ms": alone,
        "beside_ms": beside,
        "p99_alone_ms": p99_alone,
        "p99_beside_ms": p99_beside,
        "ratio": p99_beside / p99_alone,
        "long_prompt_ttft_s": ttft_s,
    }


def _step(group: LocalGroup, gaps: _Gaps) -> StepResult:
    engine = group.engine
    engine.start_step()
    result = engine.take_result()
    gaps.take(result)
    engine.finish_step()
    return result


def over_http(folder: Path, prefix_tokens: int) -> dict[str, float]:
    """Time to the first event of a real Shoal's stream: the first request, and the next ones."""
    model = f"  - {{path: {folder}, name: bench, dtype: bfloat16}}\n"
    times = []
    with run_shoal(f"bench-{free_port()}", model) as run:
        for number in range(NUM_REQUESTS):
            prompt = random_ids("http", prefix_tokens) + random_ids(f"http/{number}", _OWN_TOKENS)
            (result,) = asyncio.run(
                run_streams(run.port, num_streams=1, num_tokens=_FIRST_TOKENS, prompt=prompt)
            )
            assert result.is_done, "a stream did not end"
            times.append(result.first_event_s)
    return {"first_ttft_s": times[0], "next_ttft_s": statistics.median(times[1:])}


def plot(path: Path) -> Path:
    """Left what a prefix saves, right the gaps in order."""
    content = json.loads(path.read_text())
    figure, (left, right) = new_figure(2, width=12, height=4.5)
    cached, uncached = content["cached"], content["uncached"]
    names = ["cache off", "cache on,\nfirst request", "cache on,\nnext requests"]
    values = [uncached["next_ttft_s"], cached["first_ttft_s"], cached["next_ttft_s"]]
    drawn = left.bar(names, values, color=[PEER, OTHER, OURS])
    left.bar_label(drawn, fmt="%.2f s", padding=3)
    left.set_title(
        f"Time to the first token, {content['prefix_tokens']:,} tokens shared, {_OWN_TOKENS} own",
        fontsize=11,
    )
    left.set_ylabel("seconds")
    long = content["long_prompt"]
    for name, colour in (("alone_ms", PEER), ("beside_ms", OURS)):
        ordered = sorted(long[name])
        shares = [100 * (place + 1) / len(ordered) for place in range(len(ordered))]
        right.plot(shares, ordered, color=colour, label=name.removesuffix("_ms"))
    bar_ms = BAR * long["p99_alone_ms"]
    right.axhline(bar_ms, color=LIMIT, linestyle="--", label=f"{BAR:g} x p99 alone")
    right.set_ylim(0)
    right.set_title(
        f"Token gaps of {NUM_STREAMS} streams beside {content['long_tokens']:,}: p99 x"
        f" {long['ratio']:.2f}",
        fontsize=11,
    )
    right.set_xlabel("percentile")
    right.set_ylabel("milliseconds")
    right.legend(frameon=False)
    return save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    folder = bench_checkpoint("short" if arguments.quick else "0.5b")
    prefix_tokens, long_tokens = (256, 2_048) if arguments.quick else (2_048, 16_384)
    options = GroupOptions(
        folder,
        num_ranks=arguments.ranks,
        num_threads=max(1, num_cores() // arguments.ranks),
        kv_cache_tokens=_KV_CACHE_TOKENS,
    )
    print(f"machine: {machine()}")
    minutes = "half a minute" if arguments.quick else "5 to 12 minutes on 2 cores"
    print(f"this takes {minutes}, most of it the prompt of {long_tokens:,} tokens", flush=True)
    content: dict[str, Any] = {"prefix_tokens": prefix_tokens, "long_tokens": long_tokens}
    with LocalGroup(options) as group:
        content["kernels"] = group.kernels
        for name, is_cached in (("uncached", False), ("cached", True)):
            found = shared_prefix(group, prefix_tokens=prefix_tokens, is_cached=is_cached)
            content[name] = found
            print(
                f"{name}: TTFT {found['first_ttft_s']:.2f} s first, {found['next_ttft_s']:.2f} s"
                f" next; {found['next_computed_tokens']:.0f} tokens computed",
                flush=True,
            )
        num_gaps = 10 if arguments.quick else 100
        long = beside_long_prompt(group, prompt_tokens=long_tokens, num_gaps=num_gaps)
    content["long_prompt"] = long
    verdict = "met" if long["ratio"] <= BAR else "missed"
    print(
        f"{NUM_STREAMS} streams: p99 gap {long['p99_alone_ms']:.0f} ms alone,"
        f" {long['p99_beside_ms']:.0f} ms beside {long_tokens:,} tokens (TTFT"
        f" {long['long_prompt_ttft_s']:.1f} s): x {long['ratio']:.2f} (bar {BAR:g}: {verdict})"
    )
    if arguments.http:
        content["http"] = over_http(folder, prefix_tokens)
        print(
            f"over HTTP: TTFT {content['http']['first_ttft_s']:.2f} s first,"
            f" {content['http']['next_ttft_s']:.2f} s next"
        )
    path = write_results("prefix-quick" if arguments.quick else "prefix", content)
    print("written:", path, plot(path))


if __name__ == "__main__":
    main()
