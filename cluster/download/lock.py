"""One writer a folder, also where several pods mount its volume.

`flock`, which local disks, NFS 4 and the usual shared volumes hold between machines, and which ends
with its process. On a volume without it the download goes on and says so: a file is only renamed
into place when its digest is right, so two writers waste time and break nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .watcher import Watcher

_NAME = ".shoal-download.lock"
_POLL_S = 0.5
_TELL_PERIOD_S = 30.0


@contextlib.contextmanager
def locked(folder: Path, watcher: Watcher) -> Iterator[None]:
    """Hold the folder's lock; waits for whoever has it.

    Raises:
        InterruptedStartError: the watcher wanted the waiting to end.
    """
    descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o664)
    try:
        _acquire(descriptor, folder, watcher)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path, watcher: Watcher) -> None:
    next_line = 0.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as exc:
            if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                watcher.tell(f"{folder} cannot be locked ({exc.strerror}); going on without a lock")
                return
        if time.monotonic() > next_line:
            watcher.tell(f"waiting: another download writes to {folder}")
            next_line = time.monotonic() + _TELL_PERIOD_S
        watcher.check()
        time.sleep(_POLL_S)
