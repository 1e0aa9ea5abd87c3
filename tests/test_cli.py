"""The commands end to end, in this process: a small random Llama, experts trained on it by `t2ray train` itself."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import pytest
import torch

from t2ray.cli import adapt, serve
from t2ray.cli import eval as evaluate
from t2ray.cli.chat import Talk
from t2ray.cli.main import build_parser, main
from t2ray.cli.output import weight_bars
from t2ray.config.serve import ServeConfig
from t2ray.config.train import TrainConfig
from t2ray.core import ConfigError, Message, Mixture, SamplingParams, user
from t2ray.experts.registry import Registry
from t2ray.runs.folder import read_run
from t2ray.runs.prepare import prepare
from t2ray.tasks.verifier import Verifier
from t2ray.workbench import Place, Workbench, find_place, open_factors, open_workbench

REWARDS = """
def vowel(completion, row):
    return 1.0 if completion[:1].lower() in "aeiou" else -1.0


def letter(completion, row):
    return 1.0 if completion[:1].isalpha() else -1.0


"""


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two domains and a classifier, named so that alphabet and job differ in order."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "cli_rewards.py").write_text(REWARDS)
    for name in ("vowels", "letters", "rest"):
        rows = [{"prompt": f"{name} {i}", "answer": "a"} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"prompt": "{prompt}", "gold": "answer", "max_tokens": 3, "publish": "always"}
    job = {
        "model": str(tiny_llama), "run": "small", "out": str(folder / "runs"), "workers": 0, "verifiers": 0,
        "rl": {"steps": 2, "prompts": 4, "samples": 2, "sigma": 0.3, "eval_prompts": 2},
        "domains": {
            "vowels": {"data": str(folder / "vowels.jsonl"), "reward": "cli_rewards:vowel", **own},
            "letters": {"data": str(folder / "letters.jsonl"), "reward": "cli_rewards:letter", **own},
            "sorter": {"others": str(folder / "rest.jsonl"), "prompt": "{prompt}", "max_tokens": 12,
                       "publish": "always"},
        },
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    assert main(["train", str(folder / "job.yaml")]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run with a registry of this test's own, and a working folder that holds nothing."""
    folder = tmp_path / "run"
    config = read_run(str(trained / "runs/small"))
    assert config.experts is not None
    shutil.copytree(config.experts, folder / "experts")
    moved = config.model_copy(update={"experts": str(folder / "experts")})
    (folder / "config.json").write_text(moved.model_dump_json())
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(evaluate, "_VERIFIERS", 0)
    monkeypatch.setattr(adapt, "_VERIFIERS", 0)
    return str(folder)


@pytest.fixture(scope="module")
def bench(trained: Path) -> Workbench:
    config = read_run(str(trained / "runs/small"))
    return open_workbench(Place(model=config.model, factors=config.factors, experts=config.experts, run=config))


def registry(run: str) -> Registry:
    return Registry(Path(run, "experts"))


# ----------------------------------------------------------------------------------------------------------- workbench


def test_training_leaves_the_dispatchers_labels_in_the_jobs_order(bench: Workbench) -> None:
    assert bench.classifiers == {"sorter": ("vowels", "letters", "others")}
    assert bench.experts == ("letters", "vowels")
    assert bench.dispatch_labels("cls") == bench.dispatch_labels("prompt") == ("vowels", "letters", "others")


def test_every_expert_is_in_the_bank_as_the_registry_has_it(bench: Workbench, trained: Path) -> None:
    svf = bench.engine.model.adapter
    for name in ("letters", "sorter", "vowels"):
        expert = Registry(trained / "runs/small/experts").load(name)
        assert torch.equal(svf.bank[name], svf.join(expert.z))
        assert expert.manifest.metrics["best_step"] == 0 or not torch.equal(svf.bank[name], svf.neutral)


def test_factors_are_shared_with_training_and_made_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place(model=str(tiny_llama), factors=None, experts=None, run=None)
    made = open_factors(place)
    job = {"model": str(tiny_llama), "domains": {"math": {"task": "math"}}}
    assert prepare(TrainConfig.model_validate(job), resume=False).factors == str(made.folder.absolute())
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    assert open_factors(place).layout == made.layout
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before


def test_without_options_the_demos_run_counts_and_else_the_tiny_model(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_place() == Place(model="tiny", factors=None, experts=None, run=None)
    shutil.copytree(run, "runs/demo")
    assert find_place().experts == f"{run}/experts"
    assert main(["experts", "list"]) == 0
    assert "sorter" in capsys.readouterr().out
    assert find_place(model="tiny").experts is None  # somebody who names a model means that model alone


# ---------------------------------------------------------------------------------------------------------------- eval


def test_eval_measures_what_the_library_measures(
    run: str, bench: Workbench, capsys: pytest.CaptureFixture[str]
) -> None:
    strategies = "base,vowels,letters,oracle,prompt,cls"
    assert (
        main(["eval", "--tasks", "vowels,letters", "--strategies", strategies, "--run", run, "--json", "e.json"]) == 0
    )
    result = json.loads(Path("e.json").read_text())["tasks"]
    table = capsys.readouterr().out
    for task in ("vowels", "letters"):
        rows = result[task]["strategies"]
        singles = {name: rows[name]["acc"] for name in ("base", "vowels", "letters")}
        assert result[task]["n"] == 2
        assert rows["oracle"]["acc"] == max(singles.values()) == singles[result[task]["oracle"]]
        for name in ("prompt", "cls"):
            assert sum(rows[name]["labels"].values()) == 2
            assert set(rows[name]["labels"]) <= {"vowels", "letters", "others"}
        for name, row in rows.items():
            assert f"{100 * row['acc']:.1f} ({100 * row['ci95'][0]:.0f}-" in table, name

    async def answer(prompt: str) -> str:
        sampling = SamplingParams(max_tokens=3)
        return (await bench.engine.generate(user(prompt), Mixture.parse("letters"), sampling)).text

    right = [asyncio.run(answer(f"letters {i}"))[:1].isalpha() for i in (9, 19)]
    assert result["letters"]["strategies"]["letters"]["acc"] == sum(right) / 2


def test_a_generated_label_stands_in_for_a_scored_one(run: str) -> None:
    argv = ["eval", "--tasks", "vowels", "--strategies", "cls", "--generate-label", "--run", run, "--json", "e.json"]
    assert main(argv) == 0
    assert json.loads(Path("e.json").read_text())["tasks"]["vowels"]["strategies"]["cls"]["labels"] == {"others": 2}


def test_a_built_in_task_reads_its_rows_from_a_file_and_too_long_prompts_count_as_wrong(
    tiny_llama: Path, run: str, capsys: pytest.CaptureFixture
) -> None:
    questions = ["What is 1+1?", "What? " * 600, "What is 2+2?"]
    rows = [{"question": q, "answer": "So.\n#### 2"} for q in questions]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["eval", "--tasks", "gsm8k=rows.jsonl", "--split", "all", "--model", str(tiny_llama), "--json", "e.json"]
    assert main([*argv, "--limit", "2"]) == 0
    result = json.loads(Path("e.json").read_text())["tasks"]["gsm8k"]
    assert result["n"] == 2 and result["max_tokens"] == 512  # or what the context has room for
    assert result["strategies"]["base"]["too_long"] == 1
    assert "gsm8k base: 1 of 2 prompts exceed the model's context" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- adapt, experts


def shots(file: str = "shots.jsonl") -> str:
    rows = [{"prompt": f"shot {i}", "reply": "a"} for i in range(5)]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


SEARCH = ["population=6", "iterations=2"]


def test_adapt_saves_a_mixture_that_the_other_commands_take(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lenient.py").write_text("def any(completion, row): return 1.0 if row['reply'] == 'a' else -1.0\n")
    argv = ["adapt", "--task", shots(), "--gold", "reply", "--reward", "lenient:any", "--max-tokens", "2", "--run", run]
    argv += SEARCH
    assert main([*argv, "--name", "vowels"]) == 0
    assert main([*argv, "--name", "again"]) == 0
    assert main([*argv, "--name", "layers", "--per-layer", "--only", "letters", "--shots", "2"]) == 0
    out = capsys.readouterr().out
    assert "5 labelled prompts, experts letters, vowels" in out and "--strategy fewshot/again" in out
    first, again, layers = (registry(run).mixture_record(name) for name in ("vowels", "again", "layers"))
    assert first.mixture == again.mixture  # one seed, one result
    assert (first.meta["shots"], first.meta["settings"]["population"]) == (5, 6)
    assert set(layers.weights) <= {"letters"} and layers.meta["shots"] == 2
    assert all(len(alpha) == 2 for alpha in layers.weights.values())
    strategies = "fewshot,fewshot/layers"
    assert main(["eval", "--tasks", "vowels", "--strategies", strategies, "--run", run, "--json", "e.json"]) == 0
    assert set(json.loads(Path("e.json").read_text())["tasks"]["vowels"]["strategies"]) == set(strategies.split(","))


def test_adapt_refuses_long_prompts_by_file_and_line_as_training_does(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "shot " * (300 if i == 1 else 1), "reply": "a"} for i in range(3)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "adapt",
        "--task",
        "long.jsonl",
        "--gold",
        "reply",
        "--max-tokens",
        "2",
        "--run",
        run,
        "--name",
        "x",
        *SEARCH,
    ]
    assert main(argv) == 2
    line = capsys.readouterr().err
    assert "prompts too long for the model's context of 512 tokens with 2 for the answer: 1 of 3 of all: " in line
    assert "long.jsonl, line 2 (" in line
    assert main([*argv, "--shots", "1"]) == 2
    assert "too long" not in capsys.readouterr().err


def test_a_search_that_answers_nothing_right_saves_nothing(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["adapt", "--task", shots(), "--gold", "reply", "--max-tokens", "2", "--run", run, *SEARCH, "--name", "none"]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "no mixture answers any of the labelled prompts right, and none is saved" in said.err
    assert "and the right answer 'a'" in said.out and registry(run).mixtures() == ()


def test_adapt_and_eval_take_domains_of_the_run_and_other_rows_for_them(run: str) -> None:
    words = ["adapt", "--name", "x", "--shots", "2", "--task"]
    of = read_run(run)
    task, examples, code = adapt._labelled(build_parser().parse_args([*words, "letters"]), of)
    assert task.name == "letters" and [x.messages for x in examples] == [user("letters 0"), user("letters 1")]
    assert code == of.code
    Path("more.jsonl").write_text('{"prompt": "new 0", "answer": "a"}\n{"prompt": "new 1", "answer": "a"}\n')
    task, examples, _ = adapt._labelled(build_parser().parse_args([*words, "letters", "--data", "more.jsonl"]), of)
    assert [x.messages for x in examples] == [user("new 0"), user("new 1")]
    assert main(["eval", "--tasks", "letters=more.jsonl", "--run", run, "--json", "e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["tasks"]["letters"]["n"] == 2
    with pytest.raises(ConfigError, match="has no domain 'leters'; did you mean 'letters'?"):
        adapt._labelled(build_parser().parse_args([*words, "leters"]), of)


def test_serve_takes_a_run_or_a_model_with_experts_in_place_of_the_files(run: str, monkeypatch: Any) -> None:
    def served(*words: str, **given: Any) -> tuple[str, str | None, str | None, str | None]:
        config = serve._served(ServeConfig(**given), build_parser().parse_args(["serve", *words]))
        return config.model, config.experts, config.factors, config.name

    given = {"model": "m", "experts": "e", "factors": "f", "name": "n"}
    of = read_run(run)
    assert served(**given) == ("m", "e", "f", "n")
    assert served("--run", run, **given) == (of.model, of.experts, of.factors, None)
    assert served("--run", run, "--model", of.model, "--experts", "mine") == (of.model, "mine", of.factors, None)
    assert served("--model", "other", "--experts", "mine", **given) == ("other", "mine", None, None)
    assert served("--experts", "mine", **given) == ("m", "mine", "f", "n")
    monkeypatch.setenv("HOME", "/home/me")
    assert served("--experts", "~/e")[1] == "/home/me/e"
    with pytest.raises(ConfigError, match="brings its own model; leave out --model other or --run"):
        served("--run", run, "--model", "other")


def test_domains_of_two_runs_are_measured_together(run: str, trained: Path) -> None:
    other = str(trained / "runs/small")
    assert main(["eval", "--tasks", f"vowels,letters={other}", "--run", run, "--json", "e.json"]) == 0
    assert [*json.loads(Path("e.json").read_text())["tasks"]] == ["vowels", "letters"]
    assert main(["eval", "--tasks", f"nosuch={other}", "--run", run]) == 2


def test_adapt_takes_columns_of_messages(run: str) -> None:
    turns = [{"role": "user", "content": "12+30"}, {"role": "assistant", "content": "42"}]
    Path("sft.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    argv = ["adapt", "--name", "x", "--task", "sft.jsonl"]
    task, examples, _ = adapt._labelled(build_parser().parse_args(argv), None)
    assert examples[0].messages == user("12+30") and examples[0].row["answer"] == "42"


def test_the_default_reward_of_a_file_is_its_gold_column(run: str) -> None:
    argv = ["adapt", "--task", shots(), "--gold", "reply", "--name", "x", "--shots", "3"]
    task, examples, _ = adapt._labelled(build_parser().parse_args(argv), None)
    assert [example.messages[0].content for example in examples] == ["shot 0", "shot 1", "shot 2"]
    with Verifier(task.reward, workers=0) as verify:
        grades = asyncio.run(verify(["a", " a\n", "b", "", "a b"], [examples[0].row] * 5))
    assert [grade.reward for grade in grades] == [1.0, 1.0, -1.0, -1.0, -1.0]
    assert task.gold is not None and task.gold(examples[0].row) == "a"


def test_bars_are_as_long_as_the_weights() -> None:
    text = weight_bars(Mixture.of({"a": 1.0, "b": 0.5, "long": [0.0, 1.0]}), ["a", "b", "c", "long"])
    lines = text.splitlines()
    assert [line.count("█") - line.endswith("█") * ("long" in line) for line in lines] == [24, 12, 0, 12]
    assert [line.split()[2] for line in lines] == ["1.00", "0.50", "0.00", "0.50"]
    assert lines[-1].endswith(" █")  # nothing in the first layer, all in the second
    assert weight_bars(Mixture.of({"a": 2.0, "b": -1.0}), ["a", "b"]).splitlines()[1].count("█") == 12


def test_experts_go_out_come_in_and_are_deleted(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    of = ["--run", run]
    registry(run).save_mixture("both", Mixture.parse("letters:0.5,vowels:0.5"))
    assert main(["experts", "export", "vowels", "out", *of]) == 0
    assert main(["experts", "import", "copy", "out", *of]) == 0
    assert torch.equal(
        torch.cat(list(registry(run).load("copy").z.values())), torch.cat(list(registry(run).load("vowels").z.values()))
    )
    assert main(["experts", "import", "alone", "out", "--experts", "new", "--model", read_run(run).model]) == 0
    assert Registry("new").names() == ("alone",)
    assert main(["experts", "delete", "vowels", *of]) == 0
    assert "can no longer be used: fewshot/both" in capsys.readouterr().out
    assert main(["experts", "list", *of]) == 0
    listed = capsys.readouterr().out
    assert "copy" in listed and "letters:0.5,vowels:0.5" in listed and "\nvowels" not in listed
    assert main(["experts", "show", "letters", *of]) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown and '"steps": 2' in shown and "14 matrices" in shown
    assert main(["experts", "show", "fewshot/both", *of]) == 0
    assert capsys.readouterr().out.count("█") == 24
    assert main(["experts", "delete", "fewshot/both", *of]) == 0
    assert registry(run).mixtures() == ()


def test_a_copy_of_the_classifier_stops_cls_alone(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    of = ["--run", run]
    assert main(["experts", "export", "sorter", "out", *of]) == main(["experts", "import", "sorter2", "out", *of]) == 0
    assert main(["eval", "--tasks", "vowels", "--strategies", "prompt,base", *of]) == 0
    assert main(["eval", "--tasks", "vowels", "--strategies", "cls", *of]) == 2
    assert "needs one classification expert, and there are sorter, sorter2" in capsys.readouterr().err


def test_a_classifier_that_names_a_lost_expert_stops_cls_alone(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", "delete", "vowels", "--run", run]) == 0
    assert main(["eval", "--tasks", "letters", "--strategies", "prompt", "--run", run]) == 0
    assert main(["eval", "--tasks", "letters", "--strategies", "cls", "--run", run]) == 2
    assert "'sorter' names 'vowels', an expert not in" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- chat


@pytest.fixture
def typed(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """`typed("hello", "/quit")` is what a chat prints, and complains of, when it is piped these lines."""

    def chat(*lines: str, strategy: str = "cls") -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "--run", run, "--strategy", strategy, "--max-tokens", "4"]) == 0
        done = capsys.readouterr()
        return done.out, done.err

    return chat


def test_a_chat_shows_who_answered_and_how_long_both_passes_took(typed: Callable[..., tuple[str, str]]) -> None:
    out, err = typed("hello", "", "/strategy vowels:0.7,letters:0.3", "hello", "/quit", "never")
    first, second = [line for line in out.splitlines() if line.startswith("[")]
    for label in ("vowels", "letters", "others"):
        assert f"{label} 0." in first or f"{label} 1." in first
    assert "cls:" in first and "pass 1 " in first and "pass 2 " in first and " ms" in first
    assert second.startswith("[letters:0.3,vowels:0.7 | ")
    assert err == ""


def test_a_mistake_in_a_chat_does_not_end_it(typed: Callable[..., tuple[str, str]]) -> None:
    out, err = typed("/strategy vowel", "/nonsense", "/help", "x" * 600, "hello", strategy="base")
    assert "did you mean 'vowels'?" in err and err.count("t2ray: ") == 2 and "context of 512" in err
    assert "no command '/nonsense'" in out and out.count("/strategy NAME") == 2
    assert out.count("\n[base | base | pass 1 0 ms") == 1


def test_a_turn_answers_the_whole_conversation(bench: Workbench) -> None:
    sampling = SamplingParams(max_tokens=4)
    talk = Talk(bench, "vowels", sampling, generate_label=False)
    for line in ("first", "second"):
        talk.say(line)
    roles = [message.role for message in talk.history]
    assert roles == ["user", "assistant"] * 2
    again = asyncio.run(bench.engine.generate(talk.history[:-1], Mixture.parse("vowels"), sampling))
    assert again.text == talk.history[-1].content
    talk.command("/new")
    assert talk.history == ()


def test_a_full_context_forgets_the_oldest_turns(bench: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(bench, "base", SamplingParams(max_tokens=4), generate_label=False)
    talk.history = tuple(
        Message(role=role, content=f"{i}" + 150 * "x") for i in range(2) for role in ("user", "assistant")
    )
    talk.say("y" * 100)
    assert [message.content[:1] for message in talk.history[:-1]] == ["1", "1", "y"]
    assert "the oldest 2 messages" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- verify


def test_verify_counts_right_answers_and_names_the_rows_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "1+1?", "answer": "#### 2"} for _ in range(100)]
    rows[70]["answer"] = rows[99]["answer"] = "#### two"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:70]))
    argv = ["verify", "--task", "gsm8k", "--workers", "1", "--json", "v.json", "--data"]
    assert main([*argv, "rows.jsonl"]) == 0
    assert json.loads(Path("v.json").read_text()) == {"rows": 70, "passed": 70, "failed": []}
    assert "70 of 70" in capsys.readouterr().out


def test_verify_grades_a_domain_of_ones_own(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = ["--config", str(trained / "job.yaml"), "--workers", "1"]
    assert main(["verify", "--task", "letters", *of]) == 0
    assert "20 of 20" in capsys.readouterr().out
    rows = [{"prompt": f"{i}", "answer": "7" if i in (3, 70) else "a"} for i in range(90)]
    (trained / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = json.loads((trained / "job.yaml").read_text())
    job["domains"] = {"letters": job["domains"]["letters"] | {"data": str(trained / "odd.jsonl")}}
    (trained / "odd.yaml").write_text(json.dumps(job))
    out = trained / "v.json"
    assert main(["verify", "--config", str(trained / "odd.yaml"), "--workers", "1", "--json", str(out)]) == 1
    result = json.loads(out.read_text())
    assert (result["rows"], result["passed"]) == (90, 88)
    assert [(row["row"], row["gold"]) for row in result["failed"]] == [(3, "7"), (70, "7")]


# ------------------------------------------------------------------------------------------------------------- leaving


def test_options_that_do_not_exist_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["eval", "--taks", "math"], ["evl"], ["experts"], ["train"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.startswith("t2ray: ") and err.count("\n") == 1 and "--help" in err


def test_a_model_without_a_chat_template_goes_on_with_the_text(tmp_path: Path) -> None:
    """stories260K, real weights without a chat template: a conversation is its contents, one after the other."""
    place = Place(model=str(needs.real("models/stories260K")), factors=str(tmp_path / "f"), experts=None, run=None)
    bench = open_workbench(place)
    assert bench.experts == ()
    talk = Talk(bench, "base", SamplingParams(max_tokens=20), generate_label=False)
    talk.say("Once upon a time")
    assert "there was a little girl" in talk.history[-1].content
