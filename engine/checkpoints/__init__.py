"""From a model name to its revisions, to files on disk, to a loaded model.

Imports `study` and what stands left of it.  The only stage that knows transformers, accelerate and
the Hugging Face hub.
"""
