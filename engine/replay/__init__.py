"""Patched runs computed from the cache: only the layers after a patch, only the positions that it reaches.

Imports `measures` and what stands left of it, and `kernels`.
"""
