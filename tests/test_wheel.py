"""What is installed is the package, whole, and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "t2ray"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("t2ray-")}
    there = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there
    assert {"t2ray/py.typed", "t2ray/serve_config.yaml", "t2ray/page/index.html", "t2ray/evals/report.html"} <= held
    assert {"t2ray/tiny/model/model.safetensors", "t2ray/tiny/experts/math/v0001/expert.safetensors"} <= held
