"""What is asked: model, task, prompt pairs as tokens, head subsets, positions, and the settings of a patch.

Imports `runtime` only, and neither torch nor transformers: a tokenizer is passed in as a value.
"""
