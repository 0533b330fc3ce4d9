"""Figures, tables and the page, and in `findings` every sentence for people.

Imports `mechanism` and what stands left of it.
"""
