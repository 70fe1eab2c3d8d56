"""The engine thread of rank 0: empty the inbox, start a step, hand over what the last one made.

The only thread that touches the engine. Sockets are the I/O loop's; this loop never waits for one.
Requests and aborts are taken between steps; telling is done while a step runs.
"""

from __future__ import annotations

import sys
import time
from typing import NoReturn

from serve.engine.engine import Engine
from serve.engine.ledger import StepResult
from serve.errors import ShoalError
from serve.messages import Add, Admitted, Drop, Load, LoadReport, Refused, Summary
from serve.shards.control import ControlLink
from serve.shards.inbox import Inbox
from serve.shards.streams import TokenStreams

LOAD_REPORT_S = 0.1
# While the engine computes in Python the I/O loop waits this long for the interpreter, not 5 ms.
GIL_SWITCH_S = 0.0005


class EngineLoop:
    """Runs `engine` for as long as the process lives.

    Whoever ends a request, the replica hears exactly one `Summary` (or `Refused`) of it.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        inbox: Inbox[Add | Drop],
        streams: TokenStreams,
        control: ControlLink,
    ) -> None:
        self._engine = engine
        self._inbox = inbox
        self._streams = streams
        self._control = control
        self._last_report_s = 0.0

    def run(self) -> NoReturn:
        """Step while there is work, sleep while there is none.

        Raises:
            CollectiveError: a rank is gone, or was silent for too long.
        """
        sys.setswitchinterval(GIL_SWITCH_S)
        engine, inbox = self._engine, self._inbox
        while True:
            if not engine.has_work:
                inbox.wait()
            self._take_orders()
            engine.start_step()
            self._publish(engine.take_result())
            self._take_orders()  # admission, too, is best done while a step runs
            engine.finish_step()

    def _take_orders(self) -> None:
        for order in self._inbox.take_all():
            self._obey(order)

    def _obey(self, order: Add | Drop) -> None:
        if isinstance(order, Add):
            stream_id = order.request.stream.stream_id
            try:
                self._engine.add(order.request)
            except ShoalError as exc:
                self._control.call(self._refuse, Refused(stream_id, exc.info()))
            else:
                self._control.send(Admitted(stream_id))
        else:
            self._engine.abort(order.stream_id)

    def _publish(self, result: StepResult) -> None:
        now = time.monotonic()
        is_due = not self._engine.has_work or now - self._last_report_s >= LOAD_REPORT_S
        if is_due:
            self._last_report_s = now
        self._control.call(self._hand_over, result, self._engine.load(), is_due)

    # On the I/O loop from here on.

    def _hand_over(self, result: StepResult, load: Load, is_due: bool) -> None:
        self._streams.deliver(result.deltas, load)
        if result.summaries:
            self._finish(result.summaries)
        if is_due:
            self._control.send_now(LoadReport(load))

    def _finish(self, summaries: list[Summary]) -> None:
        for summary in summaries:
            self._streams.close(summary.stream_id)
            self._control.send_now(summary)

    def _refuse(self, refused: Refused) -> None:
        self._streams.close(refused.stream_id)
        self._control.send_now(refused)
