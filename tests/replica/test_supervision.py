from serve.replica.supervision import Action, State, Supervision


def _ready() -> Supervision:
    supervision = Supervision()
    supervision.on_ready()
    return supervision


def test_a_first_build_that_fails_ends_the_process() -> None:
    supervision = Supervision()
    assert supervision.on_build_failed() is Action.EXIT
    assert supervision.state is State.FAILED


def test_a_lost_shard_of_a_ready_replica_is_rebuilt_once_for_all_signs_of_it() -> None:
    supervision = _ready()
    assert supervision.on_lost() is Action.BUILD
    assert supervision.on_lost() is Action.NOTHING
    assert supervision.num_rebuilds == 1


def test_a_rebuild_may_fail_once_and_not_twice() -> None:
    supervision = _ready()
    supervision.on_lost()
    assert supervision.on_build_failed() is Action.BUILD
    assert supervision.on_build_failed() is Action.EXIT


def test_a_rebuild_that_succeeds_forgives_earlier_failures() -> None:
    supervision = _ready()
    for _ in range(3):
        supervision.on_lost()
        assert supervision.on_build_failed() is Action.BUILD
        supervision.on_ready()
    assert supervision.state is State.READY
    assert supervision.num_rebuilds == 3
