"""`headlapse mechanism` from a clone: the same options, the same code."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from headlapse.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["mechanism", *sys.argv[1:]], ROOT / "cache"))
