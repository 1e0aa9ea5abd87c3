"""Searches the mixture of experts for a task: `python jobs/adapt.py jobs/adapt.yaml [key=value ...]`."""

from __future__ import annotations

import sys

from t2ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["adapt", "--config", *sys.argv[1:]]))
