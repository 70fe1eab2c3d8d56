"""Shoal's data plane: from an HTTP request to tokens out of tensor-parallel shards."""

__version__ = "0.1.0"
