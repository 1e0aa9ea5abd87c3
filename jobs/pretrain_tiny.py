"""Pretrains the tiny model that t2ray ships, in about 40 minutes on one core: `python jobs/pretrain_tiny.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from t2ray.tiny import MODEL
from t2ray.tiny.pretrain import STEPS, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="the folder to write or replace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    pretrain(arguments.out, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
