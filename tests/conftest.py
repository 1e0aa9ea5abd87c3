"""What every test runs under: no network, one thread, a quiet Ray; and the fixtures that many share.

Not here: fakes. `t2ray.testing` has those, since a user's own tests need them too.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import needs
import pytest
from hypothesis import HealthCheck, settings
from waiting import GUARD_S

# Read by the libraries when they are imported, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # the matrices are so small that a second thread costs more than it computes
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),  # else Ray writes one into the home folder
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",  # else a warning about GPUs where there are none
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",  # the default of 2 s is most of a short run
    RAY_DASHBOARD_STARTUP_TIMEOUT_S="300",  # beside other work a minute may be too short,
    WANDB_X_SERVICE_WAIT="300",  # and half of one
)

# How long an example takes is the machine's matter.
settings.register_profile("t2ray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("t2ray")

# A suite that runs in a shell's background ignores Ctrl-C, and so would the processes whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The smallest template that marks every turn and the start of the answer.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip(needs.CUDA)
    if item.get_closest_marker("cluster"):
        wait_for_nodes()


@functools.cache
def wait_for_nodes() -> None:
    """Ray gives a node that this process starts 30 s to come up, which beside other work may be too short."""
    from ray._private import services

    get_node = services.get_node

    def patient(*place: Any) -> Any:
        end = time.monotonic() + GUARD_S
        while True:
            try:
                return get_node(*place)
            except RuntimeError:  # not yet
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    services.get_node = patient


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The suite's last lines: how many tests were skipped for want of what, and where to get it."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    for line in needs.counted([place[2].removeprefix("Skipped: ") for place in skipped]):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built from a copy of what a checkout holds; nothing is downloaded."""
    root, source = Path(__file__).parents[1], tmp_path_factory.mktemp("source")
    for name in ("t2ray", "tests", "benchmarks", "examples", "jobs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    built = subprocess.run([*command, str(out), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """An environment in which `t2ray` and `python` are those of a reader who has installed the package."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return kept | {"PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a seeded random Llama of 2 layers x 32, grouped k and v, one token a byte, chat template.

    float32, untied head; its matrices are 32x32 (q, o), 16x32 (k, v), 64x32 (gate, up) and 32x64 (down). Read only:
    a test that changes it copies it first.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *bytes_))}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    pad, end, *turns = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, eos_token=end, additional_special_tokens=turns, model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE

    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,  # so that greedy answers differ between prompts and mixtures
        pad_token_id=vocabulary[pad],
        bos_token_id=None,
        eos_token_id=vocabulary[end],
    )
    folder = tmp_path_factory.mktemp("tiny_llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
