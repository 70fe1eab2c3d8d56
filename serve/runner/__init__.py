"""Runs a step on the model: batch inputs, KV pool, sampling. Knows torch, not Ray."""
