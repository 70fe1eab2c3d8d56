"""Runs one Helm operation to its end, whatever the keyboard says.

A Helm operation that is cut in the middle leaves its release "pending" and locked. So it runs on
its own thread; the first Ctrl-C is delivered when it is over, a second one at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


def uninterrupted(operation: Callable[[], _Result]) -> _Result:
    """What `operation` returns or raises.

    Raises:
        KeyboardInterrupt: after `operation` has ended, or at once at the second signal.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(operation())
        except BaseException as exc:  # whatever it is, it belongs to the caller's thread
            future.set_exception(exc)

    threading.Thread(target=run, name="helm", daemon=True).start()
    try:
        return future.result()
    except KeyboardInterrupt:
        future.exception()
        raise
