"""Loops over tensors for CPUs, compiled by Numba: each does in one pass what takes several."""
