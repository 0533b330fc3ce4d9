"""Guards of the packaging: our folder `kernels/` must never stand in for Hugging Face's package of that name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_transformers_never_takes_our_kernels_folder_for_hugging_faces_package() -> None:
    code = (
        "import sys, transformers.integrations.hub_kernels\n"
        "kernels = sys.modules.get('kernels')\n"
        f"sys.exit(kernels is not None and {str(ROOT)!r} in str(getattr(kernels, '__file__', '')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.thorough
def test_scripts_say_what_they_do_without_importing_torch() -> None:
    for script in ("cache.py", "patch.py", "mechanism.py", "report.py"):
        code = (
            f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
            "try: runpy.run_path('scripts/" + script + "', run_name='__main__')\n"
            "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "e.g." in done.stdout
