"""Rewards come back in order, each within its time, and a broken reward function stops the run by name."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import GUARD_S, lives, wait_until

from t2ray.core import ConfigError, RewardError, user
from t2ray.grades import Grade
from t2ray.tasks.task import Task, load_reward
from t2ray.tasks.verifier import Verifier, verify

HERE = str(Path(__file__).parent)
NAMED = "rewards_for_tests:"


def grades(verifier: Verifier, completions: list[str], rows: list[dict[str, Any]] | None = None) -> list[Grade]:
    return asyncio.run(verifier(completions, rows if rows is not None else [{}] * len(completions)))


def grade(verifier: Verifier, completions: list[str], rows: list[dict[str, Any]] | None = None) -> list[float | None]:
    return [one.reward for one in grades(verifier, completions, rows)]


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    with Verifier(NAMED + "length", workers=1, path=HERE) as verifier:
        yield verifier


def test_rewards_come_back_in_order(pool: Verifier) -> None:
    rows = [{"length": i % 7} for i in range(100)]
    texts = ["x" * (i % 5) for i in range(100)]
    wanted = [1.0 if i % 7 == i % 5 else -1.0 for i in range(100)]
    assert grade(pool, texts, rows) == wanted
    with Verifier(NAMED + "length", workers=0, path=HERE) as here:
        assert grade(here, texts, rows) == wanted
    assert grade(pool, [], []) == []


def test_calls_at_the_same_time_keep_their_own_rewards(pool: Verifier) -> None:
    async def both() -> list[list[Grade]]:
        return await asyncio.gather(*(pool(["x" * n] * 40, [{"length": n % 2}] * 40) for n in range(4)))

    rewards = [[one.reward for one in part] for part in asyncio.run(both())]
    assert rewards == [[1.0] * 40, [1.0] * 40, [-1.0] * 40, [-1.0] * 40]


def test_a_call_of_128_rewards_is_four_messages_to_a_worker(pool: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    assert pool._pool is not None
    schedule = pool._pool.schedule

    def counted(job: Any, args: tuple[list[Any]], **limits: float) -> Any:
        sizes.append(len(args[0]))
        return schedule(job, args=args, **limits)

    monkeypatch.setattr(pool._pool, "schedule", counted)
    assert grade(pool, ["abc"] * 128, [{"length": 3, "tests": [[1, 2]] * 15}] * 128) == [1.0] * 128
    assert sizes == [32] * 4


@pytest.mark.parametrize("function", ["slow", "stubborn"])
def test_a_slow_item_scores_minus_one_and_costs_no_other_item_its_reward(function: str) -> None:
    with Verifier(NAMED + function, workers=1, timeout_s=1, path=HERE) as verifier:
        found = grades(verifier, ["a", "slow", "b", "c", "slow", "d"])
        assert [one.reward for one in found] == [1.0, -1.0, 1.0, 1.0, -1.0, 1.0]
        assert [one.fault for one in found] == [None, "timeout", None, None, "timeout", None]


def test_an_item_that_no_alarm_can_interrupt_is_ended_with_its_worker() -> None:
    with Verifier(NAMED + "deaf", workers=1, timeout_s=1, path=HERE) as verifier:
        found = grades(verifier, ["a", "slow", "b"])
        assert [(one.reward, one.fault) for one in found] == [(1.0, None), (-1.0, "timeout"), (1.0, None)]
        assert grade(verifier, ["a"]) == [1.0]


def test_items_are_graded_by_other_processes_that_stay() -> None:
    with Verifier(NAMED + "process", workers=1, path=HERE) as verifier:
        first, second = (set(grade(verifier, ["x"] * 5)) for _ in range(2))
    assert first == second and len(first) == 1 and first != {os.getpid() % 1000 / 1000}


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("raise", "raised KeyError: 'answer'"),
        ("nan", "returned nan"),
        ("text", "returned '1.0'"),
        ("two", "returned 2; it must return a number in \\[-1, 1\\]"),
        ("true", "returned True"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_reward_stops_the_run_and_names_function_and_example(
    completion: str, message: str, workers: int, broken: Verifier
) -> None:
    with Verifier(NAMED + "broken", workers=0, path=HERE) as here, pytest.raises(RewardError, match=message) as error:
        grade(broken if workers else here, ["int", completion], [{"id": "first"}, {"id": "row-17"}])
    assert "rewards_for_tests:broken" in str(error.value) and "row-17" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def broken() -> Iterator[Verifier]:
    with Verifier(NAMED + "broken", workers=1, path=HERE) as verifier:
        yield verifier


def test_a_reward_that_ends_its_process_stops_the_run(broken: Verifier) -> None:
    with pytest.raises(RewardError, match="row-17.*ended its process"):
        grade(broken, ["int", "exit"], [{"id": "first"}, {"id": "row-17"}])
    assert grade(broken, ["int"]) == [1.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("length", "module:function"),
        ("rewards_for_tests:", "module:function"),
        ("nosuch_module:f", "add nosuch_module.py"),
        (NAMED + "lenght", "no function 'lenght'; it has .*length"),
        ("rewards_for_tests.sub:f", "importing .* failed"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_refused_before_anything_starts(reward: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Verifier(reward, workers=1, path=HERE)


def test_a_reward_module_that_does_not_compile_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "half_written_rewards.py").write_text("import nosuch_library\n")
    with pytest.raises(ConfigError, match="nosuch_library"):
        load_reward("half_written_rewards:f", str(tmp_path))
    (tmp_path / "misspelt_rewards.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match="misspelt_rewards.py"):
        load_reward("misspelt_rewards:f", str(tmp_path))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers=-1"):
        Verifier(NAMED + "length", workers=-1, path=HERE)
    with pytest.raises(ConfigError, match="timeout_s=0"):
        Verifier(NAMED + "length", timeout_s=0, path=HERE)


def test_verify_counts_golds_and_shows_the_first_failures() -> None:
    rows = [{"length": i, "gold": "x" * (i if i % 10 else 99)} for i in range(120)]
    task = Task(
        name="t",
        rows=lambda split: rows,
        messages=lambda row: user("?"),
        reward=NAMED + "length",
        gold=lambda row: str(row["gold"]),
        max_tokens=8,
    )
    with Verifier(task.reward, workers=0, path=HERE) as verifier:
        found = verify(task, verifier)
        assert (found["rows"], found["passed"], len(found["failed"])) == (120, 108, 10)
        assert found["failed"][1] == {"row": 10, "reward": -1.0, "gold": "x" * 99}
        assert verify(task, verifier, rows[1:4]) == {"rows": 3, "passed": 3, "failed": []}


# --------------------------------------------------------------------------------------------------------- no leftovers


def test_closing_ends_the_workers_even_in_the_middle_of_an_item(tmp_path: Path) -> None:
    before, begun = multiprocessing.active_children(), tmp_path / "begun"
    with Verifier(NAMED + "slow", workers=1, timeout_s=600, path=HERE) as verifier:

        async def give_up() -> None:
            call = asyncio.create_task(verifier(["slow"], [{"begun": str(begun)}]))
            await asyncio.to_thread(wait_until, begun.exists, "an item that is graded")
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run(give_up())
    assert set(multiprocessing.active_children()) <= set(before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_owner(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "busy_rewards.py").write_text(
        "import os, pathlib, time\n"
        "def busy(completion, row):\n"
        "    pathlib.Path(row['file']).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    program = tmp_path / "owner.py"
    program.write_text(
        "import asyncio\n"
        "from t2ray.tasks.verifier import Verifier\n"
        "if __name__ == '__main__':\n"
        f"    with Verifier('busy_rewards:busy', workers=1, timeout_s=600, path={str(tmp_path)!r}) as verifier:\n"
        f"        asyncio.run(verifier(['x'], [{{'file': {str(tmp_path / 'pid')!r}}}]))\n"
    )
    root = str(Path(__file__).parents[1])
    owner = subprocess.Popen(
        [sys.executable, program], env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL
    )
    pid = tmp_path / "pid"
    try:
        wait_until(lambda: owner.poll() is not None or (pid.exists() and pid.read_text()), "an item that is graded")
        worker = psutil.Process(int(pid.read_text()))
        owner.send_signal(number)
        owner.wait(GUARD_S)
    finally:
        owner.kill()
    wait_until(lambda: not lives(worker), "the end of a worker whose owner has ended")
