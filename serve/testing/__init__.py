"""Shipped stand-ins for parts of Shoal: what benchmarks and tests put in a real part's place."""
