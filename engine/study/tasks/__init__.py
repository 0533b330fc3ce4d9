"""The built-in tasks and JSON Lines files of the user: pairs of prompts with a right and a wrong answer.

Imports `runtime` only.  `registry` names the tasks; each task is one file with one seeded generator.
"""
