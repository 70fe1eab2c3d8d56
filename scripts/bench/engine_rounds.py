"""Rounds of every engine at every workload, in turn, with the machine's limits before each.

Not what they say (`engine_report`). A peer that the warm-up round shows far behind the best one at
a workload is not asked there again: it cannot become the best, and costs everybody time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.planner.speed import Device
from scripts.bench.bars import Speeds, Table, best
from scripts.bench.contender import Contender, ContenderError, ContenderSpec
from scripts.bench.plan_speed import plan_device
from scripts.bench.probes import Limits, Probes
from scripts.bench.workloads import Workload

_FAR_BEHIND = 0.33  # of the best peer in the warm-up round
_WARM_UP_TOKENS = 4
_FIRST_PROMPT = list(range(16))
_READ_PASSES = 2
_LEAST_FREE_BYTES = 5 << 30


@dataclass(slots=True)
class Measured:
    """All that the rounds gave: speeds by workload and engine, CPU time a token beside them.

    By round also the machine's limits, by workload, and the machine as the planner sees it.
    """

    tables: dict[str, Table] = field(default_factory=dict)
    warm_ups: dict[str, Table] = field(default_factory=dict)
    cpu_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    limits: dict[str, dict[int, Limits]] = field(default_factory=dict)
    devices: dict[int, Device] = field(default_factory=dict)

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
    running: list[Contender],
    asked: list[Workload],
    probes: Probes,
    *,
    num_rounds: int,
    num_threads: int,
) -> Measured:
    """The warm-up and the rounds; an engine that fails is asked no more."""
    measured = Measured()
    lost: set[str] = set()
    for number in range(num_rounds + 1):
        measured.devices[number] = plan_device()
        for workload in asked:
            limits = probes.measure(num_threads, num_read_passes=_READ_PASSES)
            measured.limits.setdefault(workload.name, {})[number] = limits
            print(f"round {number}, {workload.name}: {limits}", flush=True)
            for contender in running:
                key = contender.spec.key
                if key in lost or not _is_asked(workload, contender, measured, number):
                    continue
                try:
                    _ask(workload, contender, number, measured)
                except ContenderError as exc:
                    lost.add(key)
                    print(f"lost: {key}: {exc}", flush=True)
    return measured


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
    num_tokens = workload.num_tokens if number else min(workload.num_tokens, _WARM_UP_TOKENS)
    run, cpu_s = contender.ask(workload.prompts(number), num_tokens)
    speed = workload.tokens_per_s(run)
    measured.note(workload, contender, number, speed)
    by_engine = measured.cpu_ms.setdefault(workload.name, {})
    if number:
        cpu_ms = 1e3 * cpu_s / workload.num_measured_tokens(run)
        by_engine.setdefault(contender.spec.key, []).append(cpu_ms)
    print(f"  {contender.spec.key} {speed:.1f} tok/s", flush=True)
