"""Shards: the Ray actors that hold a model's slices, and the group that a replica makes of them."""
