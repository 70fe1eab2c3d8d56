import pytest

from scripts.bench.bars import Speeds, best, limit_bar, pair_bar, peer_bar, percentile, ratio


def speeds(*values: float, is_ours: bool = False, first_round: int = 1) -> Speeds:
    return Speeds(is_ours, dict(enumerate(values, start=first_round)))


def test_ratio_is_taken_within_rounds() -> None:
    # The machine is half as fast in the second round, for both.
    assert ratio({1: 20.0, 2: 10.0}, {1: 10.0, 2: 5.0}) == 2.0
    assert ratio({1: 20.0, 2: 9.0, 3: 9.0}, {1: 10.0, 2: 9.0, 3: 10.0}) == 1.0


def test_ratio_without_a_common_round_is_that_of_the_medians() -> None:
    assert ratio({1: 10.0, 2: 20.0, 3: 30.0}, {0: 40.0}) == 0.5


def test_ratio_to_what_did_not_run_is_unknown() -> None:
    assert ratio({1: 10.0}, {}) is None


def test_best_is_the_fastest_median_of_its_side() -> None:
    table = {
        "ours": speeds(50, is_ours=True),
        "steady": speeds(10, 10, 10),
        "lucky once": speeds(90, 1, 1),
        "never ran": Speeds(is_ours=False),
    }
    assert best(table, is_ours=False) == "steady"
    assert best(table, is_ours=True) == "ours"
    assert best({"ours": table["ours"]}, is_ours=False) is None


def test_bar_against_peers_is_met_only_against_the_best_that_ran() -> None:
    table = {"ours": speeds(15, is_ours=True), "slow": speeds(5), "fast": speeds(10)}
    bar = peer_bar("decode", table, 1.5)
    assert (bar.reached, bar.verdict, bar.against) == (1.5, "met", "ours against fast")
    assert peer_bar("decode", table, 1.6).verdict == "missed"


def test_bar_without_a_peer_is_not_claimed() -> None:
    bar = peer_bar("decode", {"ours": speeds(15, is_ours=True)}, 1.5)
    assert (bar.reached, bar.verdict) == (None, "not run")


def test_bar_against_the_limit_takes_each_rounds_own() -> None:
    table = {"ours": speeds(9, 4.5, is_ours=True)}
    bar = limit_bar("decode", table, {1: 10.0, 2: 5.0}, 0.95)
    assert bar.reached == pytest.approx(0.9)
    assert bar.against == "ours against the burst limit"


def test_pair_that_is_not_complete_is_not_claimed() -> None:
    table = {"two": speeds(12, is_ours=True), "one": speeds(10, is_ours=True)}
    assert pair_bar("ranks", table, "two", "one", 1.0).reached == pytest.approx(1.2)
    assert pair_bar("ranks", table, "two", "none", 1.0).verdict == "not run"


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentile_is_one_of_the_values(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == value
