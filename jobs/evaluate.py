"""Measures strategies on tasks: `python jobs/evaluate.py jobs/evaluate.yaml [key=value ...]`."""

from __future__ import annotations

import sys

from t2ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", "--config", *sys.argv[1:]]))
