"""`python -m benchmarks learn`: what each side takes to learn a setting, beside the others."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.core.suite import machine
from benchmarks.learn import figures
from benchmarks.learn.runs import SideRun, one_round, pythons
from benchmarks.learn.settings import PEERS, Setting, brief, configured, dog, larger
from t2ray.cli.output import check_json_folder, console, write_json
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError

_NEEDS = "trl==1.16.0 and peft==0.21.2"
_VERSIONS = (
    "import json; from importlib.metadata import version; "
    "print(json.dumps({name: version(name) for name in ('trl', 'peft', 'torch')}))"
)


def learn(args: argparse.Namespace) -> None:
    """Trains every side with every learning rate and seed, prints each run, and writes the figures."""
    check_json_folder(args.json)
    trl = _trl(args.trl)
    sides = ["t2ray", *(PEERS if trl else ())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = _setting(args.setting, folder)
        config = configured(setting, args.setting, args.model, args.data)
        runs: list[SideRun] = []
        for seed, number in itertools.product(range(args.seeds), range(len(setting.rates["t2ray"]))):
            runs += one_round(setting, config, pythons(args.trl, sides), number, seed, folder)
            console.print(figures.table(figures.summed(runs[-len(sides) :], setting)), markup=False)
            _write(args.json, setting, args.setting, config, runs, trl)
    rows = figures.summed(runs, setting)
    console.print(f"\n{figures.table(rows)}\n{figures.told(figures.compared(rows))}", markup=False)


def _write(
    path: str | None, setting: Setting, name: str, config: TrainConfig, runs: list[SideRun], trl: dict[str, Any] | None
) -> None:
    """Writes what has been measured so far: a round takes minutes on a real model."""
    rows = figures.summed(runs, setting)
    write_json(path, {
        "setting": name, "target": setting.target, "window": setting.window, "rl": config.rl.model_dump(),
        "learn": rows, "beside": figures.compared(rows), "runs": [asdict(run) for run in runs], "machine": machine(1),
        "peer": trl, "date": date.today().isoformat(),
    })  # fmt: skip


def _setting(name: str, folder: Path) -> Setting:
    return dog(folder) if name == "dog" else {"larger": larger, "brief": brief}[name]()


def _trl(python: str | None) -> dict[str, Any] | None:
    """Returns the versions of TRL, PEFT and torch there; says what is skipped where there is none.

    Raises:
        ConfigError: that interpreter cannot be run, or has no TRL.
    """
    if python is None:
        console.print(f"skipped: TRL's RLOO and GRPO. For them: --trl PYTHON, of an environment with {_NEEDS}")
        return None
    if shutil.which(python) is None:
        raise ConfigError(f"--trl {python}: there is no such interpreter; name the python of TRL's environment")
    asked = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
    if asked.returncode:
        last = asked.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"--trl {python}: {' '.join(last)}; it needs {_NEEDS}")
    return dict(json.loads(asked.stdout))
