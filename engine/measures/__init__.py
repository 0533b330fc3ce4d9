"""What is measured of logits and texts: logit difference, success, normalised recovery.

Imports `capture` and what stands left of it, and neither torch nor transformers.
"""
