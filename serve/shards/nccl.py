"""Collectives of tensor parallelism between GPUs, by NCCL through torch.distributed.

Not the handshake (`serve.transport.rendezvous`): the ranks have found each other, and the sockets
between them stay open. The one decision behind it: NCCL alone does not notice a dead rank, it waits
in a kernel for ever; so a thread of each rank watches the sockets, whose end comes within
milliseconds of a death, and breaks the group: kernels are aborted, and whoever waits for the device
asks `check`, which raises. A rank that hangs is `check`'s to notice as well: torch's own limit
(`torch.distributed.set_timeout`) ends the process instead of raising, and does not see collectives
inside CUDA graphs.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from serve.errors import CollectiveError
from serve.kernels import abi

logger = logging.getLogger("shoal.shard")

_PORT = struct.Struct("<H")
_ONE_MACHINE = "shoal/one_machine"
# Who waits for the device asks `check` many times a millisecond; after a pause it is another wait.
_PAUSE_S = 1.0
# Deaths are ours to notice: torch's own watch would end the process before it said why.
_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


class DeviceGroup:
    """A `serve.model.tensor_parallel.Collectives` on tensors of a device.

    Args:
        rank: this rank.
        size: ranks in the group, more than one; every one of them makes its own at the same time.
        sockets: on rank 0 those of ranks 1 to size - 1, in that order; elsewhere rank 0's alone.
        device: where the tensors lie.
        timeout_s: longest time that the ranks may take to meet.
        backend: "gloo" is for tests without a GPU.

    Raises:
        CollectiveError: a rank left while they met.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        sockets: Sequence[socket.socket],
        device: torch.device,
        timeout_s: float = 60.0,
        backend: Literal["nccl", "gloo"] = "nccl",
    ) -> None:
        assert len(sockets) == (size - 1 if rank == 0 else 1)
        self.rank = rank
        self.size = size
        self._device = device
        self._sockets = list(sockets)
        self._failure: CollectiveError | None = None
        self._is_closed = False
        self._silence_s = math.inf
        self._waits_since_s = self._checked_s = 0.0
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            store = _meet(rank, size, sockets, timeout_s)
            if _is_one_machine(rank, sockets, store):
                # By itself NCCL meets on an address that the whole network reaches.
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=size,
                timeout=dt.timedelta(seconds=timeout_s),
                device_id=device if backend == "nccl" else None,
            )
        except (OSError, RuntimeError, ValueError) as exc:
            raise CollectiveError(f"the ranks could not form a group: {exc}") from exc
        threading.Thread(target=self._watch, name="group", daemon=True).start()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in its place: the same bits on every rank."""
        self.check()
        x = x.contiguous()
        self._call(dist.all_reduce, x)
        return x

    def gather_last_dim(self, x: Tensor) -> Tensor | None:
        """On rank 0 every rank's `x`, concatenated along the last dimension; elsewhere None."""
        self.check()
        x = x.contiguous()
        parts = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._call(dist.all_gather_into_tensor, parts, x)
        if self.rank > 0:
            return None
        return torch.cat(parts.view(self.size, *x.shape).unbind(0), dim=-1)

    def numbers(self, number: int) -> list[int]:
        """What each rank gave as `number`, on every rank; exact below 2**24."""
        numbers = torch.zeros(self.size, device=self._device)
        numbers[self.rank] = number
        return [int(found) for found in self.all_reduce(numbers)]

    def native(self) -> abi.Collectives:
        """There are none: the C decoder computes on a CPU."""
        raise CollectiveError("a group of GPUs has no collectives for C")

    def limit_silence(self, timeout_s: float) -> None:
        """Break the group when one wait for the device takes longer; until now none was too long.

        Only who asks `check` while waiting notices, that is rank 0.
        """
        self._silence_s = timeout_s

    def failure(self) -> Exception:
        """Why the group is broken."""
        return self._failure or CollectiveError("this rank left the group")

    def check(self) -> None:
        """Nothing, while every rank is there; asked again and again while waiting for the device.

        Raises:
            CollectiveError: one is gone or was silent for too long, or this one left.
        """
        now_s = time.monotonic()
        if now_s - self._checked_s > _PAUSE_S:
            self._waits_since_s = now_s
        self._checked_s = now_s
        if now_s - self._waits_since_s > self._silence_s:
            self._lose(f"{self._others()} was silent for {self._silence_s:g} s")
        if self._failure is not None or self._is_closed:
            raise self.failure()

    def close(self) -> None:
        """Leave the group; the other ranks' collectives fail from now on."""
        self._is_closed = True
        for connected in self._sockets:
            with contextlib.suppress(OSError):  # the other side may have been first
                connected.shutdown(socket.SHUT_RDWR)

    def _call(self, collective: Any, *tensors: Tensor) -> None:
        self._waits_since_s = time.monotonic()
        try:
            collective(*tensors)
        except RuntimeError as exc:
            if self._failure is None:
                self._failure = CollectiveError(f"a collective failed: {exc}")
            self.close()
            raise self._failure from exc

    def _watch(self) -> None:
        """Wait for the first socket to end; nothing else ever comes over one."""
        with selectors.DefaultSelector() as selector:
            for number, connected in enumerate(self._sockets):
                connected.setblocking(False)
                selector.register(connected, selectors.EVENT_READ, number)
            number = selector.select()[0][0].data
        lost = number + 1 if self.rank == 0 else 0
        if not self._is_closed:
            self._lose(f"rank {lost} is gone: its socket ended")

    def _lose(self, reason: str) -> None:
        if self._failure is None:
            self._failure = CollectiveError(reason)
        self.close()
        _abort()

    def _others(self) -> str:
        return f"rank {1 - self.rank}" if self.size == 2 else "one of the other ranks"


def _meet(rank: int, size: int, sockets: Sequence[socket.socket], timeout_s: float) -> TCPStore:
    """The store that the ranks exchange NCCL's addresses through; rank 0 keeps it."""
    timeout = dt.timedelta(seconds=timeout_s)
    for connected in sockets:
        connected.settimeout(timeout_s)
    if rank == 0:
        # By itself the store, which asks for no secret, listens on every address of the machine.
        host = _host(sockets[0].getsockname())
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        store = TCPStore(
            host,
            listener.getsockname()[1],
            size,
            True,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        for connected in sockets:
            connected.sendall(_PORT.pack(store.port))
        return store
    found = b""
    while len(found) < _PORT.size:
        data = sockets[0].recv(_PORT.size - len(found))
        if not data:
            raise ConnectionError("rank 0 is gone: its socket ended")
        found += data
    host = _host(sockets[0].getpeername())
    return TCPStore(host, _PORT.unpack(found)[0], size, False, timeout)


def _is_one_machine(rank: int, sockets: Sequence[socket.socket], store: TCPStore) -> bool:
    """Whether every rank is on rank 0's machine, which rank 0 sees by its sockets and tells."""
    if rank == 0:
        is_near = all(connected.family == socket.AF_UNIX for connected in sockets)
        store.set(_ONE_MACHINE, str(int(is_near)))
    return bytes(store.get(_ONE_MACHINE)) == b"1"


def _host(address: Any) -> str:
    """The host of an internet address; Unix sockets are this machine's."""
    return str(address[0]) if isinstance(address, tuple) else "127.0.0.1"


def _abort() -> None:
    """End the collectives that run, where this torch can; `check` ends who waits in any case."""
    try:
        backend: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda"))
        backend.abort()
    except (AttributeError, RuntimeError, ValueError) as exc:
        logger.debug("the group could not be aborted: %s", exc)
