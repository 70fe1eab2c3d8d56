"""What a shard is told when it is made: plain data, which needs no torch to be written."""

from __future__ import annotations

from dataclasses import dataclass

from serve.config import HardwareConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One rank's orders.

    `control_address` is where its replica listens, `secret` what both sides of every private
    socket of this group prove; `socket_dir` is where rank 0 may put a Unix socket, `host` the
    address under which other nodes reach this one.
    """

    model: ModelConfig
    hardware: HardwareConfig
    rank: int
    size: int
    replica_id: str
    control_address: str
    secret: bytes
    socket_dir: str
    host: str = "127.0.0.1"
    log_level: str = "info"
