"""Timings against other tools and against the limits of the machine.

For the repository only, not part of the wheel.  Imports every other stage.
"""
