"""Factors a model's matrices over the cluster: `python jobs/decompose.py jobs/decompose.yaml [key=value ...]`."""

from __future__ import annotations

import sys

from t2ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["decompose", "--config", *sys.argv[1:]]))
