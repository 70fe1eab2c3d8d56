from __future__ import annotations

import os
import signal
import threading
import time

from cluster.local.interrupts import Interrupts


def test_signals_are_counted_wake_a_wait_and_raise_nothing() -> None:
    with Interrupts() as interrupts:
        assert not interrupts.wait(0.01)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        began = time.monotonic()
        assert interrupts.wait(60)
        assert time.monotonic() - began < 30
        assert not interrupts.wait(0.01, num_wanted=2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.wait(60, num_wanted=2)
        assert interrupts.num_received == 2
        timer.join()


def test_former_handlers_return_at_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
