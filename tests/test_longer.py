"""Runs that go on: made longer, forked, with what changes no z changed; and rows that changed are noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import job, started

from t2ray.cluster.train.launch import train
from t2ray.config.rl import RLConfig
from t2ray.core import ConfigError, DataError, ExpertError, RunError
from t2ray.experts.registry import Registry
from t2ray.runs.folder import read_run
from t2ray.runs.prepare import prepare
from t2ray.runs.rows import ROWS
from t2ray.runs.status import read_status
from t2ray.store import Store
from t2ray.training.checkpoint import FOLDER
from t2ray.training.domain import EXPERT, Result, domain_store
from t2ray.training.metrics import notes, read_metrics

RL: dict[str, Any] = {
    "steps": 2, "prompts": 2, "samples": 2, "eval_every": 2, "eval_prompts": 4, "lr": 0.05, "schedule": "constant",
}  # fmt: skip


def made(tiny_llama: Path, out: Path, name: str, rl: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A job of one domain whose expert is published whatever it is worth."""
    config = job(tiny_llama, out, name, rl=RL | (rl or {}), **changes)
    domain = config.domains["letters"].model_copy(update={"publish": "always"})
    return config.model_copy(update={"domains": {"letters": domain}})


def changed(config: Any, **values: Any) -> Any:
    return config.model_copy(update={"domains": {"letters": config.domains["letters"].model_copy(update=values)}})


@pytest.fixture
def ended(tiny_llama: Path, tmp_path: Path) -> Any:
    config = made(tiny_llama, tmp_path, "one")
    train(config)
    return config


def test_a_finished_run_is_made_longer_and_published_again(ended: Any, tiny_llama: Path, tmp_path: Path) -> None:
    longer = made(tiny_llama, tmp_path, "one", {"steps": 6, "eval_every": 3, "micro_batch": 1, "patience": 9})
    (result,) = train(longer.model_copy(update={"verify_timeout_s": 3.0}), resume=True).values()
    assert result.steps == 6
    store = domain_store(longer, "letters")
    assert [row.step for row in read_metrics(store)] == [1, 2, 3, 4, 5, 6]
    (status,) = read_status(read_run(str(tmp_path / "one")))
    assert (status.state, status.step, status.steps) == ("done", 6, 6)
    registry = Registry(tmp_path / "one" / "experts")
    assert torch.equal(
        torch.cat(list(registry.load("letters").z.values())),
        torch.cat([store.read_tensors(EXPERT)[name] for name in registry.load("letters").z]),
    )
    assert train(longer, resume=True) == {"letters": result}  # it is done again


def test_a_run_without_checkpoints_is_not_begun_again_as_if_it_were_longer(
    ended: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    domain_store(ended, "letters").delete(FOLDER)
    with pytest.raises(RunError, match="has no checkpoint to go on from; .*run=NAME from=.*/one"):
        train(made(tiny_llama, tmp_path, "one", {"steps": 6}), resume=True)
    assert train(ended, resume=True)["letters"].steps == 2  # as it was


def test_a_run_that_patience_ended_is_done() -> None:
    ends = Result(accuracy=0.5, base_accuracy=0.5, best_step=0, steps=4, stale=2)
    assert not ends.goes_on(RLConfig(steps=40, patience=2)) and ends.goes_on(RLConfig(steps=40, patience=3))
    assert ends.goes_on(RLConfig(steps=40)) and not ends.goes_on(RLConfig(steps=4))
    earlier = Result(accuracy=0.5, base_accuracy=0.5, best_step=0, steps=4)  # it does not say why it ended
    assert not earlier.goes_on(RLConfig(steps=40, patience=2)) and earlier.goes_on(RLConfig(steps=40))


def test_what_changes_z_and_fewer_steps_are_refused(ended: Any, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="rl.steps of letters: 2 were made, now 1"):
        prepare(made(tiny_llama, tmp_path, "one", {"steps": 1}), resume=True)
    with pytest.raises(RunError, match="rl.lr: 0.05, now 0.5"):
        prepare(made(tiny_llama, tmp_path, "one", {"lr": 0.5}), resume=True)
    with pytest.raises(RunError, match="success_above: 0.0, now 0.5"):
        prepare(changed(made(tiny_llama, tmp_path, "one"), success_above=0.5), resume=True)
    free = {"on_reward_error": "abstain", "on_long_prompt": "skip", "publish": "better", "gold": "text"}
    prepare(changed(made(tiny_llama, tmp_path, "one"), **free), resume=True)


def test_a_run_of_an_earlier_version_keeps_its_length_of_an_answer_and_its_learning_rate(
    ended: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "one" / "config.json"
    before = json.loads(path.read_text())
    before["rl"] |= {"max_tokens": 48, "lr": 0.02, "baseline": "mean"}  # the defaults of before
    for key in ("algorithm", "length", "updates", "ratio_clip", "micro_tokens"):
        del before["rl"][key]
    for key in ("from",):
        del before[key]
    for key in ("success_above", "on_reward_error", "on_long_prompt", "publish"):
        del before["domains"]["letters"][key]
    path.write_text(json.dumps(before))
    resumed = prepare(made(tiny_llama, tmp_path, "one", {"lr": None}), resume=True).rl
    assert (resumed.max_tokens, resumed.lr) == (48, 0.02)


def test_rows_that_changed_under_a_resume_are_noticed(ended: Any, tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "letters.jsonl"
    longer = made(tiny_llama, tmp_path, "one", {"steps": 4})
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([lines[0].replace("row 0", "row zero"), *lines[1:]]))
    with pytest.raises(RunError, match=r"its train rows have changed since run 'one' began; .*run=NAME from=.*/one"):
        train(longer, resume=True)
    data.write_text("".join(lines))
    (tmp_path / "one" / ROWS).unlink()  # as a run of an earlier version
    train(longer, resume=True)
    assert (tmp_path / "one" / ROWS).exists()


# --------------------------------------------------------------------------------------------------------------- forks


def test_a_fork_starts_from_the_experts_of_another_run(ended: Any, tiny_llama: Path, tmp_path: Path) -> None:
    store = domain_store(ended, "letters")
    fork = made(tiny_llama, tmp_path, "two", {"lr": 1e-9, "steps": 1}).model_copy(
        update={"source": str(tmp_path / "one")}
    )
    train(fork)
    row = read_metrics(domain_store(fork, "letters"))[0]
    z = torch.cat(list(store.read_tensors(EXPERT).values()))
    assert (row.z_min, row.z_max) == pytest.approx((float(z.min()), float(z.max())), abs=1e-5)
    assert read_run(str(tmp_path / "two")).source == str(tmp_path / "one")
    Store(tmp_path / "one").delete("domains")
    train(fork.model_copy(update={"rl": fork.rl.model_copy(update={"steps": 2})}), resume=True)  # it has its own copy


def test_a_fork_of_what_is_not_there_is_refused_and_leaves_nothing(
    ended: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    def refused(source: str, **changes: Any) -> str:
        config = made(tiny_llama, tmp_path, "two", **changes).model_copy(update={"source": str(tmp_path / source)})
        with pytest.raises((RunError, ConfigError, ExpertError)) as caught:
            train(config)
        assert not (tmp_path / "two").exists()
        return str(caught.value)

    assert "no run in" in refused("three")
    started(made(tiny_llama, tmp_path, "begun"))
    assert "is not done" in refused("begun")
    assert "belongs to another base model" in refused("one", model="tiny")


# ------------------------------------------------------------------------------------------------------- before a step


def test_long_prompts_are_refused_before_the_first_step_or_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    config = made(tiny_llama, tmp_path, "one")
    data = tmp_path / "letters.jsonl"
    data.write_text(data.read_text() + json.dumps({"text": "long " * 600}) + "\n")
    with pytest.raises(DataError, match=r"domain 'letters': prompts too long .*: 1 of 37 of train: .*line 41 \(\d+"):
        train(config)
    assert not (tmp_path / "one").exists()
    skipping = changed(config, on_long_prompt="skip")
    train(skipping)
    (line,) = [line for line in notes(domain_store(skipping, "letters")) if "too long" in line]
    assert line.endswith("they are left out")


def test_an_expert_that_never_beat_its_base_is_published_only_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    config = changed(
        made(tiny_llama, tmp_path, "one"), publish="better", reward="t2ray.tasks.equal:reward", prompt="{text}"
    )
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {i}", "answer": "never"}) + "\n" for i in range(40)))
    (result,) = train(config).values()
    assert not result.beats_base and Registry(tmp_path / "one" / "experts").names() == ()
    train(changed(config, publish="always"), resume=True)
    assert Registry(tmp_path / "one" / "experts").names() == ("letters",)
