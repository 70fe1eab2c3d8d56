"""Kernels of the CPU path. Whatever implements them, a row's bits do not depend on the batch."""
