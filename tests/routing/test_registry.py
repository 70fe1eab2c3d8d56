import asyncio
import threading

import pytest

from serve.messages import Load
from serve.routing.registry import ReplicaTable, table


def test_a_listed_replica_is_ready_until_it_is_marked() -> None:
    replicas = ReplicaTable()
    replicas.set_replicas(frozenset({"a", "b"}))
    assert replicas.mark_not_ready("a")
    assert not replicas.mark_not_ready("a")
    assert replicas.ready_ids == {"b"}
    replicas.mark_ready("a")
    assert replicas.ready_ids == {"a", "b"}


def test_a_mark_does_not_outlive_the_replica_that_it_was_for() -> None:
    replicas = ReplicaTable()
    replicas.set_replicas(frozenset({"a"}))
    replicas.mark_not_ready("a")
    replicas.set_replicas(frozenset())
    replicas.set_replicas(frozenset({"a"}))
    assert replicas.ready_ids == {"a"}


def test_requests_on_their_way_count_before_any_frame_tells() -> None:
    replicas = ReplicaTable()
    replicas.set_replicas(frozenset({"a", "b"}))
    chosen = []
    for _ in range(6):
        best = min("ab", key=replicas.score)
        replicas.choose(best)
        chosen.append(best)
    assert chosen == ["a", "b"] * 3


def test_a_frame_outweighs_the_guess_and_open_requests_outweigh_an_old_frame() -> None:
    replicas = ReplicaTable()
    replicas.set_replicas(frozenset({"a"}))
    replicas.choose("a")
    replicas.set_load("a", Load(num_running=0))
    assert replicas.score("a") == (0, 0)
    replicas.book("a", +1)
    replicas.book("a", +1)
    assert replicas.score("a") == (2, 0)
    replicas.book("a", -1)
    replicas.book("a", -1)
    replicas.book("a", -1)
    assert replicas.score("a") == (0, 0)


def test_a_request_that_is_open_is_no_longer_on_its_way_and_the_others_still_are() -> None:
    replicas = ReplicaTable()
    replicas.set_replicas(frozenset({"a"}))
    for _ in range(3):
        replicas.choose("a")
    replicas.book("a", +1)
    assert replicas.score("a") == (3, 0)
    replicas.book("a", -1)
    assert replicas.score("a") == (2, 0)


def test_shards_that_are_rebuilt_do_not_inherit_the_load_of_the_lost_ones() -> None:
    replicas = ReplicaTable()
    replicas.set_replicas(frozenset({"a"}))
    replicas.set_load("a", Load(num_running=100))
    replicas.mark_not_ready("a")
    replicas.mark_ready("a")
    assert replicas.score("a") == (0, 0)


def test_waiting_ends_when_another_thread_lists_a_replica() -> None:
    replicas = ReplicaTable()

    async def wait() -> frozenset[str]:
        waiter = asyncio.create_task(replicas.wait_ready())
        await asyncio.sleep(0)
        thread = threading.Thread(target=replicas.set_replicas, args=(frozenset({"a"}),))
        thread.start()
        await asyncio.wait_for(waiter, 60)
        thread.join()
        return replicas.ready_ids

    assert asyncio.run(wait()) == {"a"}


def test_waiting_for_a_replica_that_never_comes_is_cut_by_the_caller() -> None:
    async def wait() -> None:
        await asyncio.wait_for(ReplicaTable().wait_ready(), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_every_part_of_a_process_gets_the_same_table_of_a_model() -> None:
    assert table("model-a") is table("model-a")
    assert table("model-a") is not table("model-b")
