"""What a shard is told when it is made: plain data, which needs no torch to be written."""

from __future__ import annotations

from dataclasses import dataclass

from serve.config import HardwareConfig, ModelConfig

# A step takes about a second at most (`max_step_s`): a rank that is silent for this long is frozen.
SILENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One rank's orders.

    `control_address` is where its replica listens, `secret` what both sides of every private
    socket of this group prove; `socket_dir` is where rank 0 may put a Unix socket. While the group
    serves, a rank that is silent for longer than `silence_s` is lost.
    """

    model: ModelConfig
    hardware: HardwareConfig
    rank: int
    size: int
    replica_id: str
    control_address: str
    secret: bytes
    socket_dir: str
    silence_s: float = SILENCE_S
    log_level: str = "info"
