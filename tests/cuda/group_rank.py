"""One rank of `test_group.py`, in a process of its own: rank, size, file descriptors of sockets.

After the collectives it is told by a line how long a wait may take, or to die. It says "idle" once
it was idle for longer than a wait may take and the group still stands, and at last why it broke.
"""

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
    numbers = group.numbers(2**24 - 1 - rank)
    print(total.tolist(), None if gathered is None else gathered.tolist(), numbers, flush=True)
    order = sys.stdin.readline().strip()
    if order == "die":
        os._exit(9)
    group.limit_silence(float(order))
    group.check()
    time.sleep(1.5)  # idle, for longer than a wait may take
    try:
        group.check()
        print("idle", flush=True)
        while True:
            group.check()
            time.sleep(0.01)
    except CollectiveError as exc:
        print(exc, flush=True)


main()
