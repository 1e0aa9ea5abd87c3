"""Trains one expert for each domain: `python jobs/train.py jobs/train.yaml run=NAME [key=value ...] [--resume]`."""

from __future__ import annotations

import sys

from t2ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
