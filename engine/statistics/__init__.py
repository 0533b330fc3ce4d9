"""Estimates, intervals and tests: arrays and data frames in, arrays and data frames out.

Imports `replay` and what stands left of it at most, and neither torch nor transformers.
"""
