"""Sweeps a job's settings: `python jobs/sweep.py jobs/sweep.yaml run=NAME [key=value ...] [--resume]`."""

from __future__ import annotations

import sys

from t2ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
