"""The command `headlapse`; `python -m headlapse` and the recipes in scripts/ are the same.

Plain enough for any Python 3 to read, and imports nothing but the standard library until it is known that the rest can
be had: a missing package, an old Python or an early Ctrl-C is one line, not a traceback.
"""

import os
import sys

OLDEST_PYTHON = (3, 11)


def main(arguments: "list[str] | None" = None, default_folder: "os.PathLike[str] | None" = None) -> int:
    """Run the command line (of this process, unless `arguments` are given) and return the exit status.

    Stores go to `default_folder` where neither `--store` nor HEADLAPSE_CACHE says otherwise; by default to `cache/` in
    the current folder.
    """
    if sys.version_info < OLDEST_PYTHON:
        return _refuse("headlapse needs Python 3.11 or newer, this is " + sys.version.split()[0])
    try:
        from headlapse.command_line import run
        from headlapse.engine.runtime.exit_status import exit_status_of

        words = sys.argv[1:] if arguments is None else arguments
        folder = os.environ.get("HEADLAPSE_CACHE") or os.path.relpath(default_folder or "cache")
        return exit_status_of(lambda: run(words, folder))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "headlapse", "engine", "kernels"):
            raise
        return _refuse(f"{sys.executable} lacks the package {missing}; {_how_to_install()}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(130)


def _refuse(problem: str) -> int:
    sys.stderr.write("error: " + problem + "\n")
    return 2


def _how_to_install() -> str:
    """What to type, which differs between a clone and a package that was installed."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.isfile(os.path.join(here, "pyproject.toml")):
        return "type: pip install --upgrade headlapse"
    python = os.path.relpath(os.path.join(here, ".venv", "bin", "python"))
    if os.path.exists(python):
        return f"type: {python} {' '.join(sys.argv)}"
    return "type: make demo (installs everything into .venv and runs), or: pip install -e " + os.path.relpath(here)


if __name__ == "__main__":
    sys.exit(main())
