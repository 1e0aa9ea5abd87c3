"""What is installed is the package, whole, and nothing else; what is said of its version and its tools is true."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import yaml

from t2ray.core import __version__

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("t2ray-")}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "t2ray").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there
    assert {"t2ray/py.typed", "t2ray/serve_config.yaml", "t2ray/page/index.html", "t2ray/evals/report.html"} <= held
    for model, expert in (("model", "experts/math"), ("vision_model", "vision_experts/shapes")):
        shipped = {f"{model}/model.safetensors", f"{expert}/v0001/expert.safetensors"}
        assert {f"t2ray/tiny/{name}" for name in shipped} <= held


def test_the_changelog_has_what_is_to_come_and_then_this_version_with_its_day() -> None:
    heads = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d", heads[1])


def test_the_hooks_before_a_commit_have_the_pinned_ruff() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (rev,) = [repo["rev"] for repo in repos if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={rev.removeprefix('v')}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_the_workflow_runs_what_anybody_can_run() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs == [".ci/run"]
