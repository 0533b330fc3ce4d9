"""Run a script and SIGKILL it at its Nth write to the store: `python tests/killing.py N script [arguments]`."""

import os
import runpy
import signal
import sys

import zarr.storage._local as local

from headlapse.engine.store import patched_run

left = int(sys.argv[1])
write = local._put


def put_or_die(*args, **kwargs):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return write(*args, **kwargs)


local._put = put_or_die
patched_run.new_seed = lambda: 7
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
