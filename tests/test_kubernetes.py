"""The manifests in docs/kubernetes.md run the same job and the same endpoint as the files in the repository."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from t2ray.config import train as config
from t2ray.config.serve import ServeConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
MANIFESTS = {
    manifest["kind"]: manifest
    for manifest in map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
}
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return dict(spec.get("rayClusterSpec") or spec["rayClusterConfig"])


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_a_cluster_asks_for_a_token_and_its_head_does_no_work(kind: str) -> None:
    cluster = cluster_of(MANIFESTS[kind])
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == PINS["ray"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert f"rayproject/ray:{PINS['ray']}-" in PAGE


def test_the_job_is_one_that_the_repository_has() -> None:
    spec = MANIFESTS["RayJob"]["spec"]
    python, script, job, *words = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / script).is_file()
    assert words.pop() == "--resume" and spec["backoffLimit"] > 0
    assert config.load(ROOT / job, words).out.startswith("s3://")
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].startswith("/")
    (gpu,) = cluster_of(MANIFESTS["RayJob"])["workerGroupSpecs"]
    assert gpu["minReplicas"] == 0 and gpu["maxReplicas"] > 0


def test_the_endpoint_is_serve_config_yaml_on_all_interfaces_with_keys() -> None:
    shipped = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    embedded = yaml.safe_load(MANIFESTS["RayService"]["spec"]["serveConfigV2"])
    assert shipped["http_options"]["host"] == "127.0.0.1" and embedded["http_options"]["host"] == "0.0.0.0"
    (application,) = embedded["applications"]
    arguments = ServeConfig.model_validate(application["args"])
    assert arguments.api.keys_file is not None  # whoever listens on all interfaces asks for a key
    expected = copy.deepcopy(shipped)
    expected["http_options"]["host"] = "0.0.0.0"
    expected["applications"][0]["args"].setdefault("api", {})["keys_file"] = arguments.api.keys_file
    assert embedded == expected
    for group in cluster_of(MANIFESTS["RayService"])["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == str(Path(arguments.api.keys_file).parent)
        assert pod["volumes"][0]["secret"]["secretName"] == "t2ray-keys"
