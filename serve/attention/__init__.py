"""Attention over the paged KV cache: one protocol, one implementation a kind of hardware."""
