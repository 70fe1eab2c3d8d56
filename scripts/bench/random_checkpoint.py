"""A checkpoint of a published model's shape, with random weights, written at the disk's speed.

Not for quality and not for texts: the tokenizer is the demo model's. Weights are pieces of one
random block, so that a model of 15 GB takes as long as writing 15 GB.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cluster.plan.shapes import published_configs
from serve.catalog import ModelShape
from serve.checkpoint import tensor_shapes
from serve.testing.checkpoints import add_demo_tokenizer

_BLOCK_VALUES = 1 << 23
_FILE_BYTES = 4_000_000_000
_VALUE_BYTES = 2
_SCALE = 0.02
_ONE = 0x3F80  # 1.0 as bfloat16


def write_random_checkpoint(folder: Path, repository: str) -> int:
    """Write the model of `configs/shapes.yaml` into `folder`, in bfloat16; returns its bytes."""
    config = published_configs()[repository]
    shape = ModelShape.from_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    add_demo_tokenizer(folder)
    values = np.random.default_rng(0).normal(0.0, _SCALE, _BLOCK_VALUES).astype(np.float32)
    block = memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    files = list(_split(tensor_shapes(shape)))
    names = [f"model-{at + 1:05}-of-{len(files):05}.safetensors" for at in range(len(files))]
    num_bytes = 0
    for name, tensors in zip(names, files, strict=True):
        with (folder / name).open("wb") as file:
            num_bytes += _write_file(file, tensors, block)
            os.fsync(file.fileno())
    weight_map = {
        tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors
    }
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def num_checkpoint_bytes(repository: str) -> int:
    """What `write_random_checkpoint` takes of a disk."""
    return ModelShape.from_config(published_configs()[repository]).num_params * _VALUE_BYTES


Tensors = dict[str, tuple[int, ...]]


def _split(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensors]:
    """The tensors of each file, with their shapes."""
    tensors: Tensors = {}
    for name, dims in shapes.items():
        if sum(map(math.prod, tensors.values())) * _VALUE_BYTES > _FILE_BYTES:
            yield tensors
            tensors = {}
        tensors[name] = dims
    yield tensors


def _write_file(file: BinaryIO, tensors: Tensors, block: memoryview) -> int:
    header, start = {}, 0
    for name, dims in tensors.items():
        end = start + math.prod(dims) * _VALUE_BYTES
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    file.write(struct.pack("<Q", len(text)) + text)
    draw = random.Random(0)
    for name, dims in tensors.items():
        left = math.prod(dims) * _VALUE_BYTES
        if "norm" in name:
            file.write(np.full(dims, _ONE, np.uint16).tobytes())
            continue
        at = draw.randrange(_BLOCK_VALUES) * _VALUE_BYTES
        while left:
            piece = block[at : at + left]
            file.write(piece)
            left, at = left - len(piece), 0
    return start
