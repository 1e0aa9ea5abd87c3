"""`python -m benchmarks fifth`: what is measured before and after a fifth domain, with experts that were there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.fifth import command, figures
from t2ray.config.search import CEMConfig
from t2ray.config.train import TrainConfig
from t2ray.experts.registry import Registry


def test_a_fifth_domain_is_measured_before_and_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings leave copies of shipped experts: `math` is the fourth domain's, and `pick` the fifth's."""

    def trained(config: TrainConfig) -> None:
        registry = Registry(str(config.experts))
        name, copied = ("add", "math") if config.run == "four" else ("middle", "pick")
        expert = registry.load(copied)
        registry.save(name, expert.z, base_digest=expert.manifest.base_digest)

    monkeypatch.setattr(command, "train", trained)
    monkeypatch.setattr(command, "SHOTS", 2)
    monkeypatch.setattr(command, "SEARCH", CEMConfig(population=6, iterations=1))
    assert main(["fifth", "--seeds", "1", "--prompts", "1", "--json", str(tmp_path / "found.json")]) == 0
    (seed,) = json.loads((tmp_path / "found.json").read_text())["fifth"]
    assert seed["before"]["experts"] == ["add", "code", "math", "pick"] and "middle" in seed["after"]["experts"]
    assert seed["kept"]["changed"] == [] and seed["kept"]["answers"] == 4 and seed["kept"]["differing"] == 0
    before, after = (seed[phase]["pass1"]["prompt"]["groups"]["middle"] for phase in figures.PHASES)
    assert before["acc"] == 0 and before["named"] == {"pick": 1} and after["n"] == 1
    assert seed["before"]["right"]["pick"]["expert"] == 1 and "expert" not in seed["before"]["right"]["middle"]
    kept, pass1, right, searches = figures.told([seed, seed])
    assert ", 0 changed; answers of the four: 8 with" in kept and "| pick 2 " in pass1.replace("0.0: ", "| ")
    assert len(right.splitlines()) == 8 and len(searches.splitlines()) == 6
