import threading

from serve.shards.control import ControlLink


def test_an_exception_on_the_io_loop_is_not_only_logged() -> None:
    broken: list[BaseException] = []

    def on_broken(exc: BaseException) -> None:
        broken.append(exc)
        link.loop.stop()

    link = ControlLink("unix:/nowhere", lambda _: None, lambda: None, on_broken)
    thread = threading.Thread(target=link.loop.run_forever)
    thread.start()
    link.call({}.__getitem__, "lost tokens")
    thread.join(60)
    link.loop.close()
    assert [type(exc) for exc in broken] == [KeyError]
