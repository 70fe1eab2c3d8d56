"""Runs a step on the model: batch inputs, KV pool, sampling.

Knows no Ray; torch comes with what computes in it (the reference, a GPU) alone.
"""
