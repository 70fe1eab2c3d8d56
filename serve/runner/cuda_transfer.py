"""Copies between the host and a device that neither waits for; on a CPU device, plain copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Between two looks at the device while other ranks may die: a fraction of the shortest step.
_LOOK_S = 50e-6


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on the device, behind everything that was launched before.

    The array may be changed as soon as this returns: torch keeps the pinned copy until it is read.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host.

    `check` is called while waiting, where a group of ranks may break: it raises if it did.
    """

    def __init__(self, tensors: list[Tensor], check: Callable[[], None] | None) -> None:
        self._check = check
        self._event: torch.cuda.Event | None = None
        if not tensors or tensors[0].device.type != "cuda":
            self._found = tensors
            return
        self._found = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors
        ]
        for pinned, tensor in zip(self._found, tensors, strict=True):
            pinned.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> list[np.ndarray]:
        """The tensors, once they are here.

        Raises:
            CollectiveError: a rank is gone.
        """
        if self._event is not None and self._check is None:
            self._event.synchronize()
        elif self._event is not None:
            assert self._check is not None
            while not self._event.query():  # type: ignore[no-untyped-call]
                self._check()
                time.sleep(_LOOK_S)
        return [tensor.numpy() for tensor in self._found]
