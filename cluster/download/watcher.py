"""Who sees a download go on, and may end it; not who shows it (`cluster.cli`)."""

from __future__ import annotations

from cluster.errors import InterruptedStartError


class Watcher:
    """Whoever sees a download go on; this one says nothing and never ends it."""

    def tell(self, line: str) -> None:
        """What happens, in a line: the beginning, every failure, a lock."""

    def tell_rate(self, line: str) -> None:
        """How far and how fast, in a line, every few seconds."""
        self.tell(line)

    def on_progress(self, num_bytes: int, num_total_bytes: int) -> None:
        """Bytes that have arrived, several times a second."""

    def is_stopped(self) -> bool:
        """Whether the download shall end here; what has arrived is kept."""
        return False

    def check(self) -> None:
        """Nothing, while the download shall go on.

        Raises:
            InterruptedStartError: it shall end here.
        """
        if self.is_stopped():
            raise InterruptedStartError(
                "stopped; what has arrived is kept, and the next start goes on from there"
            )
