"""The refit of the plan's shares, on runs made up from shares that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.plan.shapes import published_shape
from cluster.planner.hardware import cpu_device
from cluster.planner.speed import CPU_CALIBRATION, Roofline
from scripts.bench.plan_speed import Case, compare_plan, find_cases, fit, largest_error
from scripts.bench.workloads import workloads

ASKED = workloads(is_quick=False)
TRUE = replace(
    CPU_CALIBRATION,
    bandwidth_share=0.8,
    flops_share=1.1,
    attention_share=0.5,
    exposed_share=0.3,
)
DEVICES = {
    number: cpu_device(bandwidth_bytes_per_s=bandwidth, flops_per_s=120e9, calibration=TRUE)
    for number, bandwidth in ((1, 25e9), (2, 35e9))
}


def made_up_run() -> tuple[dict[str, dict[str, dict[int, float]]], list[Case]]:
    shape = published_shape("Qwen/Qwen2.5-0.5B-Instruct")
    assert shape is not None
    rounds = {
        workload.name: {
            "shoal-tp1": {
                number: workload.predicted_tokens_per_s(
                    Roofline(shape, 1, device), token_budget=2_048
                )
                for number, device in DEVICES.items()
            },
            "a-peer": {1: 1.0},
        }
        for workload in ASKED
    }
    devices = {workload.name: {"shoal-tp1": DEVICES} for workload in ASKED}
    return rounds, find_cases(shape, ASKED, rounds, devices)


def test_only_our_engines_are_predicted() -> None:
    _, cases = made_up_run()
    assert [(case.workload, case.engine) for case in cases] == [
        (workload, "shoal-tp1") for workload in ASKED
    ]


def test_true_shares_have_no_error_and_the_fit_comes_close() -> None:
    _, cases = made_up_run()
    assert largest_error(cases, TRUE) == pytest.approx(0.0, abs=0.02)
    assert largest_error(cases, fit(cases)) < 0.05


def test_error_is_that_of_the_worst_case_whatever_its_sign() -> None:
    _, cases = made_up_run()
    slower = replace(TRUE, bandwidth_share=0.4, exposed_share=0.0)
    one = cases[0].error(slower, frozenset({1, 2}))
    assert one == pytest.approx(-0.5, abs=0.05)
    assert largest_error(cases, slower) >= -one


def test_comparison_prints_both_errors_of_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    rounds, cases = made_up_run()
    shape = cases[0].rooflines[1].shape
    devices = {workload.name: {"shoal-tp1": DEVICES} for workload in ASKED}
    rows = compare_plan(shape, ASKED, rounds, devices)
    assert [row["workload"] for row in rows] == [workload.name for workload in ASKED]
    assert all(abs(row["error_refitted"]) <= 0.05 for row in rows)
    printed = capsys.readouterr().out
    assert "refitted to this run" in printed
    assert "fitted to the others" in printed
