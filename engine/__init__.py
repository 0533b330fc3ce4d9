"""Everything headlapse computes, in one folder per stage.

The stages import in one direction only, left to right:

    runtime → study → checkpoints → store → capture → measures → replay → statistics → mechanism → report → bench

All of them may import `kernels/`, which imports nothing of ours.  No stage prints, reads `sys.argv` or chooses paths:
that is left to the command line in `headlapse/`.  Importing a stage imports nothing by itself.
"""
