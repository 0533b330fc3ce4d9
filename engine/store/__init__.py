"""The zarr store: activations of every checkpoint, and the patched runs derived from them.

Imports `checkpoints` and what stands left of it.  The only stage that knows zarr; `zarr_group` imports no torch.
"""
