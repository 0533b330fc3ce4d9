"""One forward per checkpoint: every head's z and what replay needs besides, written into the store.

Imports `store` and what stands left of it.
"""
