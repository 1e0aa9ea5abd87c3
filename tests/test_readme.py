"""README.md works when it is pasted, block after block, into an empty folder with the package and a finished demo."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import needs
import pytest
from pages import ROOT, SHELL, Reader, blocks, commands
from waiting import GUARD_S

PAGE = ROOT / "README.md"

# How a command, or a block of Python, begins that is not run here, and why not.
EXEMPT = {
    "make demo": "a checkout's; the demo that it runs is the fixture's",
    "make test": "a checkout's; it would run this test",
    ". .venv/bin/activate": "a checkout's",
    "t2ray verify --task gsm8k": "a data set of the hub",
    "t2ray decompose meta-llama/": "a model of the hub",
    "t2ray train jobs/train.yaml": "a model of the hub",
    "t2ray eval --run runs/llama": "a model of the hub",
    "t2ray plan docs/configs/": "a checkout's file",
    "ray up": "a cluster",
    "ray job submit": "a cluster",
    "t2ray status s3://": "a cluster's run",
    "serve deploy": "a cluster",
}


FIRST = """
from t2ray.cli import demo, main
demo.PARTS = demo.PARTS[:1]
raise SystemExit(main.main(["demo", "--limit", "10"]))
"""


def ran(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=12 * GUARD_S)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout


@pytest.fixture(scope="session")
def demo(installed: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that the first part of `make demo` leaves, measured on fewer prompts."""
    folder = tmp_path_factory.mktemp("demo")
    ran(["python", "-c", FIRST], folder, installed)
    return folder


@pytest.mark.cluster
@pytest.mark.nodes  # the second part takes a minute and a half
def test_the_demo_goes_on_with_its_second_part_and_then_has_both_reports(
    demo: Path, installed: Mapping[str, str]
) -> None:
    assert ran(["t2ray", "demo", "--limit", "10"], demo, installed).count("finished before") == 1
    reports = [json.loads((demo / "runs" / name / "report.json").read_text()) for name in ("demo", "demo-vision")]
    assert [{"math", "places"} & {*report["mixtures"]} for report in reports] == [{"math"}, {"places"}]
    assert ran(["t2ray", "demo"], demo, installed).count("finished before") == 2


def test_what_is_not_run_is_on_the_page() -> None:
    """And nothing is a block that the reader could not follow."""
    found = blocks(PAGE)
    lines = [line for block in found for line in (commands(block) if block.language == SHELL else [block.text])]
    assert [begins for begins in EXEMPT if not any(line.startswith(begins) for line in lines)] == []
    assert {block.language for block in found if block.file is None} <= {SHELL, "python"}
    assert {block.file for block in found} > {"rewards.py", "larger.yaml"}


def test_the_domain_of_ones_own_is_the_examples(tmp_path: Path, installed: Mapping[str, str]) -> None:
    """The page's files are those of the folder, its rows too."""
    reader = Reader(folder=tmp_path, environment=installed)
    wanted = {"rewards.py", "larger.yaml"}
    for block in blocks(PAGE):
        if block.file in wanted or "pairs.jsonl" in block.text:
            reader.follow(block, exempt=("t2ray ", "echo "))
    example = ROOT / "examples" / "custom_reward"
    for name in (*wanted, "pairs.jsonl"):
        assert (tmp_path / name).read_text() == (example / name).read_text(), name
    rows = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert all(row["larger"] == "AB"[row["b"] > row["a"]] for row in rows)


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.skipif(shutil.which("curl") is None, reason=needs.CURL)
def test_every_block_works_when_it_is_pasted(demo: Path, installed: Mapping[str, str]) -> None:
    said = []
    with Reader(folder=demo, environment=installed) as reader:
        for block in blocks(PAGE):
            if block.language == SHELL or not block.text.startswith(tuple(EXEMPT)):
                said.append(reader.follow(block, exempt=tuple(EXEMPT)))
    page = "\n".join(said)
    assert "209 of 209 right answers score +1" in page and "accuracy 0.000 (base) -> " in page
    assert '"content":"42"' in page.replace(" ", "")  # what the endpoint answered
