"""Engines that are measured beside ours, each a process of its own Python that answers orders."""
