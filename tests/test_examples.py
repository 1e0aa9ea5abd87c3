"""Every example does what its README says, in a fresh folder, with the package as it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pages import ROOT, Reader, blocks

from t2ray.experts.registry import Registry
from t2ray.store import Store
from t2ray.training.metrics import read_metrics

EXAMPLES = ROOT / "examples"
ELSEWHERE = {"lm_eval", "inspect_ai"}  # the harnesses are no dependencies of t2ray, and of its tests neither
TABLE = re.compile(r"^\| \[(\w+)\]\(\1\) \|", re.MULTILINE)


def done(name: str, folder: Path, installed: Mapping[str, str]) -> list[str]:
    """Runs the commands of an example's README in `folder`; what each block printed."""
    shutil.copytree(EXAMPLES / name, folder, dirs_exist_ok=True)
    with Reader(folder=folder, environment=installed) as reader:
        return [reader.follow(block) for block in blocks(folder / "README.md")]


def test_the_table_of_examples_is_whole() -> None:
    folders = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert sorted(TABLE.findall((EXAMPLES / "README.md").read_text())) == folders
    assert all(f"test_{name}" in globals() for name in folders if name not in ELSEWHERE), "an example that no test runs"


def test_the_package_that_examples_run_with_is_the_wheels(installed: Mapping[str, str], tmp_path: Path) -> None:
    code = "import t2ray; print(t2ray.__file__)"
    told = subprocess.run([sys.executable, "-c", code], env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert Path(told.stdout.strip()).parents[1] == Path(installed["PYTHONPATH"])


@pytest.mark.cluster
@pytest.mark.nodes  # the README's blocks train the same domain
@pytest.mark.slow
def test_custom_reward(tmp_path: Path, installed: Mapping[str, str]) -> None:
    """The base gives no held-out answer in the wanted form, the expert nearly all; the samples' reward rises."""
    (said,) = done("custom_reward", tmp_path, installed)
    assert "larger: 209 of 209 right answers score +1" in said
    found = re.search(r"greedy validation accuracy ([\d.]+) \(base\) -> ([\d.]+)", said)
    assert found and float(found[1]) == 0 and float(found[2]) > 0.9
    rewards = [row.reward_mean for row in read_metrics(Store(tmp_path / "runs/larger/domains/larger"))]
    assert rewards[0] < -0.3 and min(rewards[-5:]) > 0.8
    assert re.search(r"^B\n\[larger:1 .*^A\n\[larger:1", said, re.MULTILINE | re.DOTALL)


@pytest.mark.cluster
@pytest.mark.nodes
def test_fifth_domain(tmp_path: Path, installed: Mapping[str, str]) -> None:
    """The classification expert names all five kinds, of which the base knows three; the four are as they were."""
    (said,) = done("fifth_domain", tmp_path, installed)
    for name in ("math", "code", "pick", "add", "middle"):
        shares = re.search(rf"^\| {name} +\| 50 +\| ([\d.]+) .*?\| ([\d.]+) ", said, re.MULTILINE)
        assert shares and (float(shares[1]) > 90) == (name not in ("add", "middle")) and float(shares[2]) > 90, said
    registry = Registry(str(tmp_path / "runs/four/experts"))
    assert {name: len(registry.versions(name)) for name in registry.names()} == {
        "add": 1, "code": 1, "dispatch": 2, "math": 1, "middle": 1, "pick": 1,
    }  # fmt: skip


@pytest.mark.cluster
@pytest.mark.nodes
def test_serve_client(tmp_path: Path, installed: Mapping[str, str]) -> None:
    """It prints what its README says that it prints."""
    _, said = done("serve_client", tmp_path, installed)
    page = (EXAMPLES / "serve_client" / "README.md").read_text()
    (printed,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert said == printed


@pytest.mark.cluster
@pytest.mark.long
def test_own_model(tmp_path: Path, installed: Mapping[str, str]) -> None:
    """A plain Hugging Face folder, elsewhere: the tiny model's, copied."""
    shutil.copytree(ROOT / "t2ray" / "tiny" / "model", tmp_path / "model")
    done("own_model", tmp_path, installed)
    found = json.loads((tmp_path / "own.json").read_text())["tasks"]["pick"]["strategies"]
    assert found["base"]["acc"] == 0 and found["pick"]["acc"] > 0.8
