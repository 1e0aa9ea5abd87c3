"""`cluster.yaml`, as shipped and in its variants, is what Ray's cluster launcher accepts, and closed to strangers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))


def variants() -> dict[str, dict[str, Any]]:
    """The cluster as shipped (`aws`), and with each commented variant's keys in place of its own."""
    shipped = yaml.safe_load(TEXT)
    found = {"aws": shipped}
    for block in TEXT.split("\n# --- ")[1:]:
        title, _, body = block.partition("\n")
        keys = yaml.safe_load(re.sub(r"^# ?", "", body, flags=re.MULTILINE))
        found[title.partition(":")[0]] = shipped | keys
    return found


VARIANTS = variants()


def test_the_variants_are_there() -> None:
    assert set(VARIANTS) == {"aws", "gcp", "local"}


@pytest.mark.parametrize("name", VARIANTS)
def test_ray_accepts_the_cluster(name: str) -> None:
    config = VARIANTS[name]
    jsonschema.validate(config, SCHEMA)
    assert config["provider"]["type"] == name
    prepared = prepare_config(config)
    validate_config(prepared)
    assert set(prepared) >= {"available_node_types", "head_node_type", "file_mounts"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_node_asks_for_the_token_and_gets_it(name: str) -> None:
    config = VARIANTS[name]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[key] if "ray start" in command]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token" in start.partition("ray start")[0]
        assert "--disable-usage-stats" in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_head_does_no_work_and_gpu_nodes_come_from_none(name: str) -> None:
    config = VARIANTS[name]
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    workers = {key: value for key, value in types.items() if key != config["head_node_type"]}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert workers["gpu"]["max_workers"] > 0
    assert workers["gpu_spot"] | {"max_workers": 0} == workers["gpu_spot"]  # an option, switched off
    spot = json.dumps(workers["gpu_spot"]["node_config"])
    assert '"MarketType": "spot"' in spot or '"preemptible": true' in spot


def test_the_images_have_the_ray_that_is_pinned() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    for key in ("image", "head_image", "worker_image"):
        assert f":{pins['ray']}-" in VARIANTS["aws"]["docker"][key]
