"""Rewards of every kind: plain and async, several with weights, those that abstain, and those that fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2ray.core import ConfigError, RewardError
from t2ray.grades import Grade
from t2ray.tasks.grading import weighed
from t2ray.tasks.task import load_reward
from t2ray.tasks.tiny import reward_math
from t2ray.tasks.verifier import Verifier

HERE = str(Path(__file__).parent)
NAMED = "rewards_for_tests:"
SEVERAL = {NAMED + "short": 1.0, NAMED + "vowel": 3.0}


def grades(verifier: Verifier, completions: list[str], row: dict[str, Any] | None = None) -> list[Grade]:
    return asyncio.run(verifier(completions, [row or {}] * len(completions)))


def rewards(verifier: Verifier, completions: list[str], row: dict[str, Any] | None = None) -> list[float | None]:
    return [grade.reward for grade in grades(verifier, completions, row)]


@pytest.fixture(scope="module", params=["here", "in a process"])
def workers(request: pytest.FixtureRequest) -> int:
    return int(request.param == "in a process")


@pytest.fixture(scope="module")
def judge(workers: int) -> Iterator[Verifier]:
    with Verifier(NAMED + "judge", workers=workers, timeout_s=1, path=HERE) as verifier:
        yield verifier


# ---------------------------------------------------------------------------------------------------------------- kinds


def test_async_rewards_are_awaited_all_at_once(workers: int) -> None:
    with Verifier(NAMED + "meets", workers=workers, timeout_s=60, path=HERE) as verifier:
        assert rewards(verifier, ["x"] * 8, {"together": 8}) == [1.0] * 8


def test_an_async_reward_comes_back_in_order_and_may_abstain(judge: Verifier) -> None:
    found = grades(judge, ["abc", "abstain", "abcde"])
    assert [(grade.reward, grade.right) for grade in found] == [(0.3, True), (None, False), (0.5, True)]


def test_an_async_reward_that_is_late_costs_no_other_its_reward() -> None:
    with Verifier(NAMED + "judge", workers=1, timeout_s=1, path=HERE) as verifier:
        found = grades(verifier, ["abc", "slow", "abcde"])
    assert [(grade.reward, grade.fault) for grade in found] == [(0.3, None), (-1.0, "timeout"), (0.5, None)]


def test_a_plain_reward_may_run_an_event_loop_of_its_own() -> None:
    with Verifier(NAMED + "plain_that_awaits", workers=1, path=HERE) as verifier:
        assert rewards(verifier, ["x"]) == [0.5]


def test_several_rewards_are_their_mean_by_weight_each_beside_it(workers: int) -> None:
    with Verifier(SEVERAL, workers=workers, path=HERE, success_above=0.5) as verifier:
        found = grades(verifier, ["ab", "xy", "xyz", "abstain"])
    assert [grade.reward for grade in found] == [1.0, 0.25, -0.25, None]
    assert [grade.right for grade in found] == [True, False, False, False]
    assert found[1].parts == {NAMED + "short": 1.0, NAMED + "vowel": 0.0} and found[3].parts == {}


def test_a_reward_that_abstains_leaves_the_mean_to_the_others() -> None:
    assert weighed({"a": 1.0, "b": 3.0}, {"a": None, "b": 0.5}, 0.0) == Grade(
        reward=0.5, right=True, parts={"b": 0.5}
    )  # fmt: skip
    assert weighed({"a": 1.0, "b": -1.0}, {"a": 1.0, "b": 1.0}, 0.0).reward == 0.0  # a penalty
    assert weighed({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": None}, 0.0).reward is None  # none that counts
    assert weighed({"a": 1.0, "b": 1.0}, {"a": "timeout", "b": 1.0}, 0.0) == Grade(
        reward=0.0, right=False, parts={"a": -1.0, "b": 1.0}, fault="timeout"
    )  # fmt: skip


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-1, 1)), min_size=1, max_size=5))
def test_a_weighted_reward_stays_a_reward(pairs: list[tuple[float, float]]) -> None:
    weights = {str(i): weight for i, (weight, _) in enumerate(pairs)}
    reward = weighed(weights, {str(i): mark for i, (_, mark) in enumerate(pairs)}, 0.0).reward
    assert reward is None or -1.0 <= reward <= 1.0


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("function", ["leaves", "judge"])
def test_a_reward_that_exits_is_named_and_ends_nothing_else(function: str, workers: int) -> None:
    with Verifier(NAMED + function, workers=workers, timeout_s=60, path=HERE) as verifier:
        with pytest.raises(RewardError, match=rf"'rewards_for_tests:{function}', .*row-17.*, called sys\.exit\(1\)$"):
            grades(verifier, ["x", "leave"], {"id": "row-17"})
        assert rewards(verifier, ["x"]) != [None]


def test_failures_that_a_job_forgives_are_grades_that_say_so(workers: int) -> None:
    with Verifier(SEVERAL, workers=workers, path=HERE, forgive=True) as verifier:
        found = grades(verifier, ["ab", "raise", "xyz"])
    assert [(grade.reward, grade.fault) for grade in found] == [(1.0, None), (None, "error"), (-0.25, None)]
    with Verifier(NAMED + "broken", workers=1, path=HERE, forgive=True) as verifier:
        found = grades(verifier, ["int", "exit", "nan"])  # one ends its process
    assert [(grade.reward, grade.fault) for grade in found] == [(1.0, None), (None, "error"), (None, "error")]


def test_an_error_of_several_lines_is_one(workers: int) -> None:
    with Verifier(SEVERAL, workers=workers, path=HERE) as verifier, pytest.raises(RewardError) as caught:
        grades(verifier, ["raise"])
    assert str(caught.value).endswith("raised ValueError: no way")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys\nsys.exit(3)\n", r"importing 'leaving_rewards' failed: it called sys\.exit\(3\)$"),
        ("raise ValueError('a\\nb')\n", "failed: ValueError: a b$"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n", r"it called sys\.exit\(2\)$"),
    ],
)
def test_a_module_that_fails_while_it_is_imported_is_named_in_one_line(
    source: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "leaving_rewards.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_reward("leaving_rewards:f", str(tmp_path))


FAR = """
import json, sys
from t2ray.core import ConfigError
from t2ray.tasks.task import load_reward
found = []
for folder, name in json.loads(sys.argv[1]):
    try:
        found.append(load_reward(name, folder)("x", {}))
    except ConfigError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def loaded(*names: tuple[Path, str]) -> list[Any]:
    """What rewards return, or why not, in a process of their own: they would shadow this one's modules."""
    argv = [sys.executable, "-c", FAR, json.dumps([[str(folder), name] for folder, name in names])]
    found = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return list(json.loads(found.stdout))


@pytest.mark.parametrize("library", ["math", "random", "datasets", "torch", "t2ray", "email"])
def test_a_reward_module_with_a_librarys_name_is_refused(library: str, tmp_path: Path) -> None:
    (tmp_path / f"{library}.py").write_text("def f(completion, row): return 1.0\n")
    (line,) = loaded((tmp_path, f"{library}:f"))
    assert f"{library}.py shares its name with a library; rename it, such as to {library}_rewards.py" in line


def test_a_checkout_of_t2ray_is_a_folder_of_rewards_like_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the folder of a submitted job is."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "t2ray").mkdir()
    (tmp_path / "t2ray" / "__init__.py").write_text("raise AssertionError('another t2ray than the one that runs')")
    assert load_reward("t2ray.tasks.tiny:reward_math", str(tmp_path)) is reward_math


def test_what_a_neighbour_hides_is_told(tmp_path: Path) -> None:
    (tmp_path / "own_rewards.py").write_text("import yaml\nyaml.load\ndef f(completion, row): return 1.0\n")
    (tmp_path / "yaml.py").write_text("")
    (line,) = loaded((tmp_path, "own_rewards:f"))
    assert "has no attribute 'load'; yaml.py in " in line and "shares its name with a library" in line


def test_a_neighbour_with_a_name_of_pythons_own_disturbs_nothing(tmp_path: Path) -> None:
    (tmp_path / "own_rewards.py").write_text("import math\ndef f(completion, row): return math.ceil(0.5)\n")
    for name in ("math", "random", "types", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    before = list(sys.path)
    try:
        with Verifier("own_rewards:f", workers=1, path=str(tmp_path)) as verifier:
            assert rewards(verifier, ["x"]) == [1.0]
    finally:
        sys.path[:] = before
        del sys.modules["own_rewards"]


def test_two_jobs_may_each_have_a_module_of_one_name(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        (folder / "own_rewards.py").write_text(f"def f(completion, row): return {i / 10}\n")
    a, b = folders
    assert loaded((a, "own_rewards:f"), (b, "own_rewards:f"), (a, "own_rewards:f")) == [0.0, 0.1, 0.0]
