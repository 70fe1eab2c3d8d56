"""Rounds of every engine at every workload, in turn, with the machine's limits beside each.

Not what they say (`engine_report`). Round 0 warms up and counts for nobody, but a peer that it
shows far behind the best one at a workload is not asked there again: it cannot become the best, and
costs everybody time. In the others the burst is probed before each workload, what the machine
sustains before and after each of our engines, and each decode is asked twice: first for some
tokens, so that threads just thawed are awake and what can be cached is, then in earnest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.planner.speed import Device
from scripts.bench.bars import Speeds, Table, best
from scripts.bench.contender import Contender, ContenderError, ContenderSpec
from scripts.bench.plan_speed import mean_device, plan_device
from scripts.bench.probes import Limits, Probes, between
from scripts.bench.workloads import Workload

_FAR_BEHIND = 0.33  # of the best peer in the warm-up round
_WARM_UP_TOKENS = 4  # also of the order that wakes an engine before one that counts
_FIRST_PROMPT = list(range(16))
_READ_PASSES = 2
_LEAST_FREE_BYTES = 5 << 30


@dataclass(slots=True)
class Measured:
    """All that the rounds gave: speeds by workload and engine, CPU time a token beside them.

    By round also the machine's bursts, by workload; and what it sustained around each of our
    engines, and how the planner saw it then, by workload and engine.
    """

    tables: dict[str, Table] = field(default_factory=dict)
    warm_ups: dict[str, Table] = field(default_factory=dict)
    cpu_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bursts: dict[str, dict[int, Limits]] = field(default_factory=dict)
    sustained: dict[str, dict[str, dict[int, Limits]]] = field(default_factory=dict)
    devices: dict[str, dict[str, dict[int, Device]]] = field(default_factory=dict)

    def table(self, name: str) -> Table:
        """One workload's rounds, with the warm-up's figure for peers that were not asked again."""
        return {**self.warm_ups.get(name, {}), **self.tables.get(name, {})}

    def note(self, workload: Workload, contender: Contender, number: int, speed: float) -> None:
        """One order's speed; round 0 is the warm-up."""
        tables = self.tables if number else self.warm_ups
        table = tables.setdefault(workload.name, {})
        spec = contender.spec
        table.setdefault(spec.key, Speeds(spec.is_ours)).by_round[number] = speed


def start(wanted: list[ContenderSpec], logs: Path) -> tuple[list[Contender], dict[str, str]]:
    """Every engine that starts, and why the others did not."""
    running: list[Contender] = []
    failed: dict[str, str] = {}
    for spec in wanted:
        free_bytes = psutil.virtual_memory().available
        if free_bytes < _LEAST_FREE_BYTES:
            failed[spec.key] = f"only {free_bytes / 2**30:.1f} GiB of memory are free"
            print(f"not run: {spec.key}: {failed[spec.key]}", flush=True)
            continue
        try:
            contender = Contender(spec, logs / f"{spec.key}.log")
            contender.ask([_FIRST_PROMPT], _WARM_UP_TOKENS)  # what is made or read on first use
            running.append(contender)
        except ContenderError as exc:
            failed[spec.key] = str(exc)
            print(f"not run: {spec.key}: {exc}")
            continue
        facts = running[-1].facts
        print(
            f"{spec.key}: {facts.name} {facts.version}; {facts.num_threads} threads; {facts.dtype};"
            f" {running[-1].memory_bytes() / 2**30:.1f} GiB; {'; '.join(facts.notes)}",
            flush=True,
        )
    return running, failed


def measure(
    running: list[Contender], asked: list[Workload], probes: Probes, *, num_rounds: int
) -> Measured:
    """The warm-up and the rounds; an engine that fails is asked no more."""
    rounds = _Rounds(probes)
    for number in range(num_rounds + 1):
        for workload in asked:
            print(f"{f'round {number}' if number else 'warm-up'}, {workload.name}", flush=True)
            if number:
                rounds.probe_burst(workload, number)
            for contender in running:
                rounds.ask(workload, contender, number)
    return rounds.measured


class _Rounds:
    """What was measured so far, and who was lost."""

    def __init__(self, probes: Probes) -> None:
        self.measured = Measured()
        self._probes = probes
        self._lost: set[str] = set()
        self._just_now: tuple[Limits, Device] | None = None  # before the next engine

    def probe_burst(self, workload: Workload, number: int) -> None:
        """What the machine gives at most."""
        burst = self._probes.burst(_READ_PASSES)
        self.measured.bursts.setdefault(workload.name, {})[number] = burst
        print(f"  burst: {burst}", flush=True)

    def ask(self, workload: Workload, contender: Contender, number: int) -> None:
        """Ask one engine, unless it is lost or too slow for this workload."""
        spec = contender.spec
        if spec.key in self._lost or not _is_asked(workload, contender, self.measured, number):
            return
        try:
            if number and spec.is_ours:
                self._ask_between_probes(workload, contender, number)
            else:
                self._just_now = None
                _ask(workload, contender, number, self.measured)
        except ContenderError as exc:
            self._lost.add(spec.key)
            print(f"lost: {spec.key}: {exc}", flush=True)

    def _ask_between_probes(self, workload: Workload, contender: Contender, number: int) -> None:
        before, device_before = self._just_now or self._probe()
        self._just_now = None
        _ask(workload, contender, number, self.measured)
        self._just_now = after, device_after = self._probe()
        measured, key = self.measured, contender.spec.key
        around = between(before, after)
        measured.sustained.setdefault(workload.name, {}).setdefault(key, {})[number] = around
        device = mean_device(device_before, device_after)
        measured.devices.setdefault(workload.name, {}).setdefault(key, {})[number] = device
        print(f"    sustained around it: {around}", flush=True)

    def _probe(self) -> tuple[Limits, Device]:
        return self._probes.sustained(), plan_device()


def _is_asked(workload: Workload, contender: Contender, measured: Measured, number: int) -> bool:
    spec = contender.spec
    if spec.is_ours:
        return True
    if workload.ours_only:
        return False
    if number == 0:
        return True
    table = measured.warm_ups[workload.name]
    first = best(table, is_ours=False)
    assert first is not None, "this peer took part"
    return spec.key in table and table[spec.key].median >= _FAR_BEHIND * table[first].median


def _ask(workload: Workload, contender: Contender, number: int, measured: Measured) -> None:
    key, prompts = contender.spec.key, workload.prompts(number)
    few_tokens = min(workload.num_tokens, _WARM_UP_TOKENS)
    if number and not workload.is_prefill:
        contender.ask(prompts, few_tokens)
    run, cpu_s = contender.ask(prompts, workload.num_tokens if number else few_tokens)
    speed = workload.tokens_per_s(run)
    if speed is None:
        if number:
            print(f"  {key}: not measured: its prompts never all decoded at once", flush=True)
        return
    measured.note(workload, contender, number, speed)
    if number:
        cpu_ms = 1e3 * cpu_s / workload.num_computed_tokens(run)
        measured.cpu_ms.setdefault(workload.name, {}).setdefault(key, []).append(cpu_ms)
    print(f"  {key} {speed:.1f} tok/s", flush=True)
