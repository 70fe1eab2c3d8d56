"""Bytes of a snapshot's files onto a volume: some files at a time, each going on where it stopped.

A file grows as `.shoal-partial/<digest>`, so that bytes of one content never continue another's,
and takes its place by a rename once its size and digest are right. Threads that wait for a hub die
with the process: whoever ends it does not wait for a silent connection.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import DownloadError

from .hub import Hub, RemoteFile, Snapshot
from .marker import file_size
from .refusal import CHANGED_HINT, HubError
from .watcher import Watcher

_PARTIAL = ".shoal-partial"
_NUM_FILES_AT_ONCE = 4
_TELL_PERIOD_S = 5.0
_POLL_S = 0.1
_MAX_FAILURES = 6
_FIRST_PAUSE_S = 1.0
_BLOCK_BYTES = 1 << 22
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Pace:
    """How patient a transfer is; each pause is twice as long as the one before it.

    A failure counts until new bytes come. With the defaults a hub may be away for half a minute.
    """

    first_pause_s: float = _FIRST_PAUSE_S
    max_failures: int = _MAX_FAILURES
    tell_period_s: float = _TELL_PERIOD_S


PATIENT = Pace()


class Transfer:
    """Fetches files of one snapshot into a folder that this process has locked.

    Args:
        hub: who has the files.
        snapshot: what they are.
        folder: holds the parts, and the lock.
        place: where a file goes, on the same volume.
        elsewhere: how the user gives another volume, for who has too small a one.
        watcher: is told, and asked whether to go on.
        pace: how patient it is.
    """

    def __init__(
        self,
        hub: Hub,
        snapshot: Snapshot,
        folder: Path,
        *,
        place: Callable[[RemoteFile], Path],
        elsewhere: str,
        watcher: Watcher,
        pace: Pace,
    ) -> None:
        self._hub = hub
        self._snapshot = snapshot
        self._folder = folder
        self._partial = folder / _PARTIAL
        self._place_of = place
        self._elsewhere = elsewhere
        self._watcher = watcher
        self._pace = pace
        self._is_stopped = threading.Event()

    def run(self, files: Sequence[RemoteFile]) -> None:
        """Return when every one of `files` is in place.

        Raises:
            DownloadError: the first failure; the other files keep what they have.
            InterruptedStartError: the watcher wanted it to end.
        """
        self._partial.mkdir(exist_ok=True)
        wanted = [file for file in files if not self._is_in_place(file)]
        self._check_space(wanted)
        futures, threads = self._start(wanted)
        try:
            self._follow(futures, wanted)
        except BaseException:
            self._is_stopped.set()
            raise
        for thread in threads:
            thread.join()

    def clean(self) -> None:
        """Remove what is left of parts, those of other revisions too."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def _is_in_place(self, file: RemoteFile) -> bool:
        self._watcher.check()
        path = self._place_of(file)
        if file_size(path) == file.size and _has_digest(path, file):
            return True
        path.unlink(missing_ok=True)
        return False

    def _check_space(self, files: Sequence[RemoteFile]) -> None:
        needed = sum(file.size for file in files) - self._num_bytes(files)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise self._no_space(needed, free)

    def _no_space(self, needed: int, free: int) -> DownloadError:
        total = sum(file.size for file in self._snapshot.files)
        return DownloadError(
            f"no space: {self._folder} needs {_size(needed)} more and has {_size(free)} free",
            hint=f"The model takes {_size(total)}. {self._elsewhere}",
        )

    def _start(
        self, files: Sequence[RemoteFile]
    ) -> tuple[list[Future[None]], list[threading.Thread]]:
        """Let some threads bring the files, one after the other."""
        waiting: queue.SimpleQueue[tuple[RemoteFile, Future[None]]] = queue.SimpleQueue()
        futures: list[Future[None]] = []
        for file in files:
            futures.append(Future())
            waiting.put((file, futures[-1]))
        threads = [
            threading.Thread(target=self._work, args=(waiting,), daemon=True)
            for _ in range(min(_NUM_FILES_AT_ONCE, len(files)))
        ]
        for thread in threads:
            thread.start()
        return futures, threads

    def _work(self, waiting: queue.SimpleQueue[tuple[RemoteFile, Future[None]]]) -> None:
        while not self._is_stopped.is_set():
            try:
                file, future = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._bring(file)
                future.set_result(None)
            except BaseException as exc:
                future.set_exception(exc)

    def _follow(self, futures: Sequence[Future[None]], files: Sequence[RemoteFile]) -> None:
        """Tell how far it is until all are done, or one has failed, or nobody wants it."""
        total = sum(file.size for file in files)
        began, first = time.monotonic(), self._num_bytes(files)
        next_line = began + self._pace.tell_period_s
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            self._watcher.check()
            now = self._num_bytes(files)
            self._watcher.on_progress(now, total)
            if pending and time.monotonic() > next_line:
                next_line += self._pace.tell_period_s
                speed = (now - first) / (time.monotonic() - began)
                rest = f", {(total - now) / speed:.0f} s to go" if speed > 0 and now < total else ""
                self._watcher.tell_rate(
                    f"{now / _GB:.2f} of {total / _GB:.2f} GB ({100 * now / max(total, 1):.0f} %),"
                    f" {speed / 1e6:.0f} MB/s{rest}"
                )

    def _num_bytes(self, files: Sequence[RemoteFile]) -> int:
        """Bytes that have arrived."""
        return sum(
            max(file_size(self._part(file)), file_size(self._place_of(file)), 0) for file in files
        )

    def _part(self, file: RemoteFile) -> Path:
        return self._partial / file.digest

    def _bring(self, file: RemoteFile) -> None:
        """One file, whatever it takes; runs in a thread."""
        num_failures = 0
        while (size := file_size(self._part(file))) != file.size:
            try:
                self._append(file)
            except HubError as exc:
                num_failures = 1 if file_size(self._part(file)) > size else num_failures + 1
                if not exc.is_temporary or num_failures >= self._pace.max_failures:
                    raise exc.error from exc
                pause_s = self._pace.first_pause_s * 2 ** (num_failures - 1)
                self._watcher.tell(f"{exc}; again in {pause_s:g} s")
                self._is_stopped.wait(pause_s)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                needed = file.size - max(file_size(self._part(file)), 0)
                raise self._no_space(needed, shutil.disk_usage(self._folder).free) from exc
            if self._is_stopped.is_set():
                return
        self._place(file)

    def _append(self, file: RemoteFile) -> None:
        """Write what one answer brings behind what is there."""
        size = file_size(self._part(file))
        offset = size if 0 < size < file.size else 0
        with (
            self._hub.read(self._snapshot, file, offset=offset) as (is_rest, chunks),
            self._part(file).open("ab" if is_rest else "wb", buffering=0) as part,
        ):
            for chunk in chunks:
                part.write(chunk)
                if self._is_stopped.is_set():
                    return
                if part.tell() > file.size:
                    break
            os.fsync(part.fileno())
            if part.tell() != file.size:
                error = DownloadError(
                    f"{file.name}: the hub sent {part.tell()} bytes of {file.size}",
                    hint=CHANGED_HINT,
                )
                if part.tell() > file.size:
                    raise error
                raise HubError(error, status=0)

    def _place(self, file: RemoteFile) -> None:
        part = self._part(file)
        if not _has_digest(part, file):
            part.unlink()
            raise DownloadError(
                f"{file.name} arrived damaged, or was changed on the hub meanwhile: its digest is"
                f" not {file.digest}. It was removed",
                hint="Start the download again; if it stays so, look at the mirror or the volume.",
            )
        part.replace(self._place_of(file))


def _has_digest(path: Path, file: RemoteFile) -> bool:
    digest = hashlib.sha256() if len(file.digest) == hashlib.sha256().digest_size * 2 else None
    if digest is None:
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest() == file.digest


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GB:.1f} GB" if num_bytes >= _GB else f"{num_bytes / 1e6:.1f} MB"
