"""Code for CPUs alone: fused operations, and loops compiled by Numba, each of which does in one
pass over memory what otherwise takes several.

This folder can be deleted: everything then runs by PyTorch's operations, slower. Only
irv2/network/accelerate.py imports it.
"""
