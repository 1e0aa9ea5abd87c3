"""vLLM's own server with mixtures in `vllm_xargs`: `vllm serve --quantization t2ray`, as docs/vllm.md says it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx2 as httpx
import pytest
from endpoint import free_port, wait_until
from small import together
from waiting import GUARD_S

from t2ray.adapters.factors import decompose
from t2ray.core import Mixture, SamplingParams, user
from t2ray.engine.offline import OfflineEngine
from t2ray.experts.registry import SHIPPED, Registry
from t2ray.models.weights import TINY

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (make vllm)")]

PROMPTS = ("17+25", "98-13", "reverse abc")
CHECK = ("--logits-processors", "t2ray.engine.vllm.plugin:Mixtures")


def command(folder: Path, port: int, *options: str) -> list[str]:
    decompose("tiny", folder / "factors")
    (folder / "svf.json").write_text(json.dumps({"factors": str(folder / "factors"), "experts": str(SHIPPED)}))
    override = json.dumps({"quantization_config_file": str(folder / "svf.json")})
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TINY), "--quantization", "t2ray"]
    plain = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**26)]
    return [*vllm, "--hf-overrides", override, *plain, "--served-model-name", "tiny", "--port", str(port), *options]


ENVIRONMENT = os.environ | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
}  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            command(folder, port, *CHECK, "--no-enable-prefix-caching"), stdout=log, stderr=subprocess.STDOUT,
            env=ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: process.poll() is not None or httpx.get(f"{address}/health").is_success, "a start")
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GUARD_S)


def ask(url: str, text: str, mixture: str | None) -> httpx.Response:
    extra = {"vllm_xargs": {"t2ray": mixture}} if mixture is not None else {}
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 16}
    return httpx.post(f"{url}/v1/chat/completions", json=body | extra, timeout=GUARD_S)


def test_vllms_own_server_answers_mixtures_and_refuses_wrong_ones(url: str, tmp_path: Path) -> None:
    from t2ray.adapters.model import load_model

    model = load_model("tiny", decompose("tiny", tmp_path / "factors").folder, device="cpu")
    offline, registry = OfflineEngine(model), Registry(SHIPPED)
    offline.set_experts({name: model.adapter.join(registry.load(name).z) for name in registry.names()})
    asked = [(text, mixture) for text in PROMPTS for mixture in (None, "math", "code", "math:0.7,code:0.3")]
    sampling = SamplingParams(max_tokens=16)
    wanted = together(*(offline.generate(user(text), Mixture.parse(m or "base"), sampling) for text, m in asked))
    with ThreadPoolExecutor(len(asked)) as pool:
        found = [answer.json() for answer in pool.map(lambda one: ask(url, *one), asked)]
    assert [one["choices"][0]["message"]["content"] for one in found] == [one.text for one in wanted]
    assert len({one.text for one in wanted}) > len(PROMPTS)
    for wrong, said in (("maths", "math"), ("math:x", "not a number"), ("math,math", "twice")):
        refused = ask(url, "17+25", wrong)
        assert refused.status_code == 400 and said in refused.text
    assert ask(url, "17+25", "math").is_success


UNSALTED = "--no-enable-prefix-caching"


@pytest.mark.parametrize(("options", "said"), [(CHECK, UNSALTED), ((UNSALTED,), "--logits-processors")])
def test_it_does_not_start_where_it_would_answer_wrongly(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, free_port(), *options), env=ENVIRONMENT, capture_output=True, text=True, timeout=GUARD_S
    )
    assert done.returncode and said in done.stdout + done.stderr
