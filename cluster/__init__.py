"""Shoal's control plane: from a configuration to running processes, and back down."""
