"""One rank of `test_group.py`, in a process of its own: rank, size, file descriptors of sockets."""

from __future__ import annotations

import os
import socket
import sys
import time

import torch

from serve.errors import CollectiveError
from serve.shards.nccl import DeviceGroup


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    sockets = [socket.socket(fileno=int(number)) for number in sys.argv[3:]]
    group = DeviceGroup(
        rank=rank, size=size, sockets=sockets, device=torch.device("cpu"), backend="gloo"
    )
    total = group.all_reduce(torch.tensor([1.0, 10.0]) * (rank + 1))
    gathered = group.gather_last_dim(torch.full((2, 2), float(rank)))
    print(total.tolist(), None if gathered is None else gathered.tolist(), flush=True)
    sys.stdin.readline()
    if rank == size - 1:
        os._exit(9)
    try:
        while True:
            group.check()
            time.sleep(0.01)
    except CollectiveError as exc:
        print(exc, flush=True)


main()
