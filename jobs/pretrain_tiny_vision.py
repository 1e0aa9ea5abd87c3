"""Pretrains the tiny vision model that t2ray ships, in under an hour: `python jobs/pretrain_tiny_vision.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from t2ray.tiny import VISION
from t2ray.tiny.vision import EYE_STEPS, LAST_STEPS, STEPS, pretrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=VISION, help="the folder to write or replace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--last-steps", type=int, default=LAST_STEPS)
    parser.add_argument("--eye-steps", type=int, default=EYE_STEPS)
    arguments = parser.parse_args()
    pretrain(
        arguments.out,
        seed=arguments.seed,
        steps=arguments.steps,
        eye_steps=arguments.eye_steps,
        last_steps=arguments.last_steps,
    )


if __name__ == "__main__":
    main()
