"""What heads do and how their weights change: attribution, attention patterns, circuits.

Imports `statistics` and what stands left of it.
"""
