"""Runs a step on the model: batch inputs, KV pool, sampling. Not Ray, and torch only where it computes."""
