"""Every mistake that a user makes ends with one line that names the value and the remedy, code 2, and no file written.

All go through the command line, in this process; the modules' own tests have the finer points.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import needs
import psutil
import pytest
import ray
import torch
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file
from waiting import GUARD_S, end_all, family, wait_until

from t2ray.adapters.factors import Factors, decompose
from t2ray.cli import adapt
from t2ray.cli import eval as evaluate
from t2ray.cli.main import main
from t2ray.cluster import session
from t2ray.cluster.train import launch as cluster_train
from t2ray.core import Mixture, ResourceError
from t2ray.experts.registry import Registry
from t2ray.models.weights import Weights

REWARDS = """
def good(completion, row):
    return 1.0


def raises(completion, row):
    return row["no such column"]


def nan(completion, row):
    return float("nan")


def text(completion, row):
    return "1.0"


def two(completion, row):
    return 2
"""
ROWS = '{"prompt": "one", "answer": "a"}\n{"prompt": "two", "answer": "b"}\n'


@pytest.fixture
def place(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, rows, rewards and a job that is right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "_VERIFIERS", 0)
    monkeypatch.setattr(adapt, "_VERIFIERS", 0)
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "bad_rewards.py").write_text(REWARDS)
    write_job(tmp_path)
    return tmp_path


def write_job(place: Path, **domain: Any) -> None:
    job = {
        "model": "model", "run": "bad", "workers": 0, "verifiers": 0,
        "rl": {"steps": 1, "prompts": 2, "samples": 2, "eval_prompts": 2},
        "domains": {
            "mine": {"data": "rows.jsonl", "prompt": "{prompt}", "reward": "bad_rewards:good", "max_tokens": 2} | domain
        },
    }  # fmt: skip
    (place / "job.yaml").write_text(json.dumps(job))


def write_sweep(place: Path, job: dict[str, Any]) -> None:
    sweep = {"kind": "rl", "sampler": "grid", "job": job, "space": {"rl.lr": [0.01, 0.02]}}
    (place / "sweep.yaml").write_text(json.dumps(sweep))


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("eval", ...)` is the line that the command ends with; what it may have written is named by `leaves`."""

    def run(*argv: str, leaves: str = "") -> str:
        before = sorted(place.rglob("*"))
        code = main(argv)
        err = capsys.readouterr().err
        assert code == 2, err
        assert err.startswith("t2ray: ") and err.count("\n") == 1 and "Traceback" not in err, err
        new = [str(path.relative_to(place)) for path in sorted(place.rglob("*")) if path not in before]
        written = [path for path in new if "__pycache__" not in path and not (leaves and re.match(leaves, path))]
        assert not written, written
        return err

    return run


Refused = Callable[..., str]


def test_the_job_that_the_mistakes_are_made_in_is_right(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "job.yaml"]) == 0
    assert "experts: " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- keys and names


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.stepz=3", "unknown key 'rl.stepz'; did you mean 'steps'?"),
        ("modle=x", "unknown key 'modle'; did you mean 'model'?"),
        ("domains.mine.promt=x", "unknown key 'domains.mine.promt'; did you mean 'prompt'?"),
        ("domains.mine.rl.lrr=1", "unknown key 'lrr'; did you mean 'lr'?"),
        ("rl.steps=none", "rl.steps: .*integer.*not 'none'"),
        ("rl.steps=0", "rl.steps: .*greater than or equal to 1, not 0"),
        ("rl.steps", "'rl.steps' is not key=value"),
        ("preset=papr", "unknown preset 'papr'; did you mean 'paper'?"),
        ("run=My Run", "'My Run' cannot be this run's name: use"),
        ("domains.mine.prompt={question}", "prompt: .*string, not {'question': None}"),
        ("domains.mine.prompt=Q {question}", "no column 'question'; it has answer, prompt"),
        ("domains.other.task=gsm9k", "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
        ("model=./nowhere", "model './nowhere': no such folder; name a folder"),
        ("targets=['*.nope']", "target pattern '\\*.nope' matches no matrix; its names look like 'model.layers"),
        ("layers=7", "layers '7': the model has no targets in layer 7; it has them in layers 0 to 1"),
    ],
)
def test_a_wrong_key_or_value_of_a_job(refused: Refused, override: str, message: str) -> None:
    assert re.search(message, refused("train", "job.yaml", override))


def test_a_job_that_is_missing_or_no_yaml(place: Path, refused: Refused) -> None:
    assert "nowhere.yaml: no such configuration file" in refused("train", "nowhere.yaml")
    (place / "job.yaml").write_text("model: [tiny\nrun: x")
    assert re.search(r"job.yaml: not valid YAML: .*line 2", refused("train", "job.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("eval --tasks maht --model model", "unknown task 'maht'; did you mean 'math'?"),
        ("eval --tasks math,math --model model", "--tasks 'math,math': .*each once"),
        ("eval --tasks gsm8k= --model model", "gsm8k= names no file"),
        ("eval --tasks math --limit 0 --model model", "--limit is 0; it must be at least 1"),
        ("eval --tasks math --json nowhere/e.json --model model", "no folder .*nowhere; make it first"),
        ("eval --tasks math --run nowhere", "no run in nowhere; `t2ray train` makes one"),
        ("eval --tasks math --run runs/x --model tiny", "leave out the model tiny or the run"),
        ("eval --tasks math --experts nowhere", "nowhere holds no experts; train some by"),
        ("verify --task maths", "unknown task 'maths'; did you mean 'math'?"),
        ("verify", "name a built-in task by --task, or a training job by --config"),
        ("verify --config job.yaml --task min", "no domain 'min'; did you mean 'mine'?"),
        ("verify --config job.yaml", "'mine' has no gold answers to verify; name their column with gold: COLUMN"),
        ("verify --task math --workers 0", "--workers is 0; it must be at least 1"),
        ("adapt --task gsm9k --name x", "unknown task 'gsm9k'; did you mean 'gsm8k'?"),
        ("adapt --task rows.jsonl --name X!", "'X!' cannot be this mixture's name: use"),
        ("adapt --task rows.jsonl --name x --shots 0", "--shots is 0; it must be at least 1"),
        ("adapt --task rows.jsonl --name x populaton=3", "unknown key 'populaton'; did you mean 'population'?"),
        ("adapt --task rows.jsonl --name x elite=2", "elite: a share of the population.*, such as 0.2.*not 2"),
        (
            "adapt --task rows.jsonl --name x --gold label",
            "gold: rows.jsonl has no column 'label'; it has answer, prompt",
        ),
        ("adapt --task rows.jsonl --name x --reward bad_rewards:god", "no function 'god'; it has .*good"),
        ("experts list", "no registry: there is no runs/demo here; name one by --experts or --run"),
        ("chat --max-tokens 0", "max_tokens is 0; it must be at least 1"),
        ("chat --temperature -1", "temperature is -1.0; it must be 0"),
        ("decompose model --out f --targets *.nope", "pattern '\\*.nope' matches no matrix"),
    ],
)
def test_a_wrong_word_on_the_command_line(refused: Refused, argv: str, message: str) -> None:
    assert re.search(message, refused(*argv.split()))


@pytest.mark.parametrize("strategy", ["cls", "prompt", "oracle"])
def test_a_strategy_that_needs_experts_where_there_are_none(refused: Refused, strategy: str) -> None:
    line = refused("eval", "--tasks", "math", "--strategies", strategy, "--model", "model", leaves="runs")
    assert f"strategy {strategy!r} needs experts to choose from, and there are none" in line and "--experts" in line


# ---------------------------------------------------------------------------------------------------------- data files

BAD_FILES = {
    "missing.jsonl": (None, "missing.jsonl: no such data file; give a file .*, or a hub"),
    "empty.jsonl": ("", "empty.jsonl: the file holds no rows"),
    "torn.jsonl": (ROWS + '{"prompt": "thr', "torn.jsonl, line 3: not valid JSON"),
    "list.jsonl": (ROWS + "[1]\n", "list.jsonl, line 3: a row is an object of columns, not list"),
    "mixed.jsonl": (
        ROWS + '{"prompt": 3, "answer": "c"}\n',
        "mixed.jsonl, line 3: .*'prompt' holds a number, but a str",
    ),
    "short.csv": ("prompt,answer\none,a\ntwo\n", "short.csv, line 3: 1 fields, but the header names 2"),
    "noise.parquet": ("PAR1 no", "noise.parquet: not a readable Parquet file"),
    "rows.txt": (ROWS, "rows.txt: its name ends in '.txt'; a data file is one of"),
    "gap.jsonl": (ROWS + '{"answer": "c"}\n', "gap.jsonl, line 3: the column 'prompt' is missing; the row has answer"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("command", ["train", "adapt"])
def test_a_bad_data_file_is_told_with_file_and_line(place: Path, refused: Refused, name: str, command: str) -> None:
    content, message = BAD_FILES[name]
    if content is not None:
        (place / name).write_text(content)
    write_job(place, data=name)
    argv = ["train", "job.yaml"] if command == "train" else ["adapt", "--task", name, "--name", "x"]
    assert re.search(message.replace(".txt: its", ".*: its"), refused(*argv))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1+1?"}, "rows.jsonl, line 2: the column 'answer' is missing; the row has question"),
        (
            {"question": 1, "answer": "#### 2"},
            "rows.jsonl, line 2: the column 'question' holds '1' .int.; it must hold str",
        ),
    ],
)
@pytest.mark.parametrize("command", ["verify --task gsm8k --data rows.jsonl", "eval --tasks gsm8k=rows.jsonl"])
def test_a_bad_row_of_a_built_in_task_is_told_with_its_line(
    place: Path, refused: Refused, row: dict[str, Any], message: str, command: str
) -> None:
    rows = [{"question": "1+1?", "answer": "#### 2"}, row]
    (place / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert re.search(message, refused(*command.split()))


def test_a_row_without_its_gold_is_told_with_its_line(place: Path, refused: Refused) -> None:
    (place / "rows.jsonl").write_text(ROWS + '{"prompt": "three"}\n')
    write_job(place, gold="answer")
    assert "rows.jsonl, line 3: the column 'answer' is missing" in refused("verify", "--config", "job.yaml")


def test_a_classifiers_own_rows_need_a_prompt(place: Path, refused: Refused) -> None:
    job = json.loads((place / "job.yaml").read_text())
    job["domains"]["sorter"] = {"others": "rows.jsonl"}
    (place / "job.yaml").write_text(json.dumps(job))
    assert re.search("domains.sorter: others: .*rows.jsonl also needs prompt", refused("train", "job.yaml"))


# ------------------------------------------------------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nowhere:good", "reward 'nowhere:good': no module 'nowhere' in .*add nowhere.py there"),
        ("bad_rewards:god", "bad_rewards has no function 'god'; it has good"),
        ("bad_rewards", "reward 'bad_rewards' is not of the form module:function"),
    ],
)
def test_a_reward_that_is_missing_stops_before_anything_starts(
    place: Path, refused: Refused, reward: str, message: str
) -> None:
    write_job(place, reward=reward)
    assert re.search(message, refused("train", "job.yaml"))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("raises", "raised KeyError: 'no such column'"),
        ("nan", r"returned nan; it must return a number in \[-1, 1\]"),
        ("text", r"returned '1.0'; it must return a number in \[-1, 1\]"),
        ("two", r"returned 2; it must return a number in \[-1, 1\]"),
    ],
)
def test_a_reward_that_fails_stops_the_run_and_names_the_example(
    place: Path, refused: Refused, function: str, says: str
) -> None:
    write_job(place, reward=f"bad_rewards:{function}")
    line = refused("train", "job.yaml", leaves="runs")
    assert re.search(rf"'bad_rewards:{function}', for the completion .* of the example .*'(one|two)'.* {says}", line)
    assert not list(place.glob("runs/bad/experts/*"))


# -------------------------------------------------------------------------------------------------- models and experts


@pytest.fixture
def copied(place: Path) -> Path:
    """A model of one's own to break."""
    return Path(shutil.copytree(place / "model", place / "copy"))


@pytest.mark.parametrize(
    "command", ["decompose copy --out f", "eval --tasks math --model copy", "train job.yaml model=copy"]
)
def test_a_model_folder_without_safetensors_or_with_a_truncated_shard(
    copied: Path, refused: Refused, command: str
) -> None:
    shard = copied / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert re.search(r"model.safetensors is truncated: \d+ bytes where .* copy it again", refused(*command.split()))
    shard.unlink()
    assert re.search(r"copy has no \*.safetensors; name a model folder", refused(*command.split()))


def test_a_model_without_a_tokenizer_or_a_run_without_a_configuration(copied: Path, refused: Refused) -> None:
    (copied / "tokenizer.json").unlink()
    line = refused("chat", "--model", "copy")  # before it is decomposed
    assert "copy: no tokenizer that transformers can load: " in line and "name a folder with tokenizer.json" in line
    (copied / "config.json").write_text("{")
    assert "copy/config.json is not a configuration that this t2ray wrote" in refused("chat", "--run", "copy")


@pytest.mark.parametrize(
    "command", ["decompose org/name --out f", "chat --model org/name", "train job.yaml model=org/name"]
)
def test_a_hub_name_without_a_network_says_how_to_use_a_folder(refused: Refused, command: str) -> None:
    line = refused(*command.split())
    assert (
        "model 'org/name' is neither a folder here nor available from the hub" in line and "path of its folder" in line
    )


@pytest.fixture
def expert(place: Path) -> Path:
    """A registry with one expert, of another base than the job's model."""
    shapes = {"model.layers.0.self_attn.q_proj": torch.ones(32)}
    Registry(place / "experts").save("alien", shapes, base_digest="ab" * 16)
    return place / "experts"


@pytest.mark.parametrize(
    "command",
    [
        "eval --tasks math --model model --experts experts",
        "chat --model model --experts experts",
        "adapt --task rows.jsonl --name x --model model --experts experts",
    ],
)
def test_an_expert_of_another_base_is_refused_before_the_model_is_decomposed(
    expert: Path, refused: Refused, command: str
) -> None:
    assert re.search(
        r"expert 'alien' .* belongs to another base model: it was made for abab.*; name its own model",
        refused(*command.split()),
    )


@pytest.mark.parametrize(
    "command",
    ["experts show aline", "experts delete aline", "experts export aline out", "experts delete fewshot/aline"],
)
def test_an_unknown_expert_names_the_nearest(expert: Path, refused: Refused, command: str) -> None:
    Registry(expert).save_mixture("alone", Mixture.parse("alien"))
    line = refused(*command.split(), "--experts", "experts")
    assert re.search(r"no (expert|mixture) 'aline' in .*experts; did you mean '(alien|alone)'\? \(known: al", line)


def test_an_unknown_expert_or_mixture_of_eval_adapt_and_chat(place: Path, refused: Refused) -> None:
    digest = Weights("model").digest
    main(["decompose", "model", "--out", "f"])
    z = {target.name: torch.ones(target.rank) for target in Factors.open("f").layout}
    Registry("experts").save("math", z, base_digest=digest)
    of = ("--model", "model", "--factors", "f", "--experts", "experts")
    line = refused("eval", "--tasks", "math", "--strategies", "maths", *of)
    assert "no strategy or expert 'maths'; did you mean 'math'?" in line
    assert "no mixture 'math' in experts" in refused("eval", "--tasks", "math", "--strategies", "fewshot", *of)
    assert "names the expert 'math' twice" in refused("chat", "--strategy", "math:1,math:2", *of)
    assert "'x' is not a number; write name:weight" in refused("chat", "--strategy", "math:x", *of)
    assert "no expert 'mth'; did you mean 'math'?" in refused(
        "adapt", "--task", "math", "--name", "x", "--only", "mth", *of
    )
    assert "needs one classification expert, and there is none" in refused("chat", "--strategy", "cls", *of)
    line = refused("adapt", "--task", "math", "--name", "x", "budget_prompts=3", *of)
    assert "budget_prompts is 3" in line and "raise the budget" in line
    assert Registry("experts").mixtures() == ()


def test_an_import_that_is_none_leaves_no_expert(place: Path, refused: Refused) -> None:
    main(["decompose", "model", "--out", "f"])
    (place / "noise.safetensors").write_bytes(b"noise")
    of = ("--model", "model", "--factors", "f", "--experts", "experts")
    assert "nowhere cannot be read as an expert" in refused("experts", "import", "x", "nowhere", *of)
    assert "noise.safetensors cannot be read as an expert" in refused(
        "experts", "import", "x", "noise.safetensors", *of
    )
    assert "'X' cannot be this expert's name" in refused("experts", "import", "X", "noise.safetensors", *of)


@pytest.fixture
def other(copied: Path) -> Path:
    """A model of the same shape with other weights."""
    shard = copied / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    return copied


@pytest.mark.parametrize("rest", ["workers=0", "workers=1 cpus=1"])
def test_a_job_with_the_factors_of_another_base_is_refused(
    other: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    main(["decompose", "model", "--out", "f"])
    monkeypatch.setattr(cluster_train, "session", no_cluster)
    line = refused("train", "job.yaml", "model=copy", "factors=f", *rest.split())
    assert re.search(r"f holds factors of the base \w+, the model is \w+; ", line)


def test_a_job_whose_registry_has_experts_of_another_base_is_refused(expert: Path, refused: Refused) -> None:
    line = refused("train", "job.yaml", f"experts={expert}")
    assert re.search(
        r"expert 'alien' .* belongs to another base model: it was made for abab.*; name its own model", line
    )


def test_a_run_that_began_with_another_base_is_not_resumed(
    other: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "job.yaml"])
    capsys.readouterr()  # its alarms
    line = refused("train", "job.yaml", "model=copy", "--resume")
    assert re.search(r"started with another configuration: model: .*model.*, now .*copy\"; use another run=NAME", line)


# ------------------------------------------------------------------------------------------------------------- cluster


@contextmanager
def no_cluster() -> Iterator[dict[str, float]]:
    raise AssertionError("no cluster is needed to see this")
    yield {}


def no_model(*_: object, **__: object) -> None:
    raise AssertionError("nothing that takes long is needed to see this")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that asks for the suite's token."""
    with tempfile.TemporaryDirectory(prefix="t2ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # sockets lie in it, and their names must be short
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def attached(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Commands go to that cluster, and none gets as far as the model."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster_train, "decompose", no_model)
    monkeypatch.setattr(session, "_PROBE_S", GUARD_S)  # a node that has not answered by then passes for one that sees
    return address


@pytest.mark.cluster
def test_workers_that_ask_for_more_than_the_cluster_has(attached: str, refused: Refused) -> None:
    line = refused("train", "job.yaml", "workers=3", "cpus=2")
    assert "needs 6 CPU, the cluster has 2 CPU; lower workers, cpus or gpus" in line
    assert "needs 1 GPU, the cluster has 0 GPU" in refused("train", "job.yaml", "workers=1", "gpus=1")


@pytest.mark.cluster
def test_a_cluster_of_another_ray_or_python(attached: str, refused: Refused) -> None:
    key, namespace = b"CLUSTER_METADATA", b"cluster"  # what a driver compares itself with
    gcs = GcsClient(address=attached)
    own = gcs.internal_kv_get(key, namespace)
    try:
        for name, value in (("ray_version", "2.59.0"), ("python_version", "3.12.1")):
            gcs.internal_kv_put(key, json.dumps(json.loads(own) | {name: value}).encode(), True, namespace)
            line = refused("train", "job.yaml", "workers=1", "cpus=1")
            assert re.search(rf"the cluster runs Ray .*{value}.*, this is Ray .*; install the cluster's versions", line)
            assert ray._private.worker.global_worker.node is None, "nothing is left of the attempt"
    finally:
        gcs.internal_kv_put(key, own, True, namespace)


def test_a_ray_that_does_not_come_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: Any) -> None:
        raise Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed"
        )

    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setattr(ray, "init", late)
        patch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(ResourceError, match="Ray did not come up within its 30 seconds"), session.session():
            pass


@pytest.mark.cluster
def test_a_token_that_is_missing_or_wrong(address: str, place: Path) -> None:
    """In processes of their own: Ray reads the token once."""
    code = "import sys; from t2ray.cli.main import main; sys.exit(main(sys.argv[1:]))"
    env = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"}
    env |= {"HOME": str(place), "RAY_ADDRESS": address}
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", code, "train", "job.yaml", "workers=1"],
            env=env | token, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for token in ({}, {"RAY_AUTH_TOKEN": "ab" * 32})
    ]  # fmt: skip
    told = [(*command.communicate(timeout=GUARD_S), command.returncode) for command in commands]
    assert [code for _, _, code in told] == [2, 2]
    (_, missing, _), (_, wrong, _) = told
    remedy = "the cluster's token is in ~/.ray/auth_token of the machine that started it"
    assert missing.startswith(f"t2ray: no token for the Ray cluster at {address}; {remedy}")
    assert wrong.startswith(f"t2ray: the Ray cluster at {address} refuses the token; {remedy}")
    assert missing.count("\n") == wrong.count("\n") == 1 and not (place / "runs").exists()


@pytest.fixture
def blind_node(address: str, place: Path) -> Iterator[None]:
    """A second node, to which the working folder is an empty one: a mount of its own, as on a machine of its own."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip(needs.ROOT)
    with tempfile.TemporaryDirectory(prefix="t2ray") as folder:
        log = Path(folder, "log")
        ray = [str(Path(sys.executable).parent / "ray"), "start", f"--address={address}", "--block", "--num-cpus=1",
               f"--temp-dir={folder}/n", "--disable-usage-stats"]  # fmt: skip
        with log.open("w") as file:
            node = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {place} && exec {shlex.join(ray)}"],
                stdout=file, stderr=file, cwd="/",
            )  # fmt: skip
        try:
            wait_until(lambda: node.poll() is not None or "Ray runtime started" in log.read_text(), "a second node")
            assert node.poll() is None, log.read_text()
            yield
        finally:
            end_all([*family(node.pid), psutil.Process(node.pid)])
            node.wait()


@pytest.mark.cluster
def test_a_folder_that_the_nodes_do_not_share(blind_node: None, attached: str, place: Path, refused: Refused) -> None:
    line = refused("train", "job.yaml", "workers=1", "cpus=1")
    assert re.search(
        r"/runs is not shared: .* is not seen on [\d.]+; name a folder that all nodes mount, or s3://", line
    )
    job = json.loads((place / "job.yaml").read_text()) | {"workers": 1, "cpus": 1}
    write_sweep(place, job)
    assert "/runs is not shared: " in refused("sweep", "sweep.yaml")


def test_a_sweep_over_a_job_with_the_factors_of_another_base_is_refused_before_a_cluster_is_looked_for(
    place: Path, refused: Refused
) -> None:
    decompose("tiny", place / "factors")
    write_sweep(place, json.loads((place / "job.yaml").read_text()) | {"factors": "factors"})
    line = refused("sweep", "sweep.yaml")
    assert re.search(r"factors holds factors of the base \w+, the model is \w+; ", line)
    assert not ray.is_initialized()
