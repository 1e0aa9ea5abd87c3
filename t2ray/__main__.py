"""`python -m t2ray`: the command line."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() not in Path(__file__).resolve().parents:
    # The working folder, where a reward called as a library would hide it; the command `t2ray` does not look there.
    del sys.path[0]

from t2ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
