"""Shoal on this machine: a private folder, Ray's processes, and nothing left when it ends."""
