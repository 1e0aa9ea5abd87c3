"""The tiny tasks cannot be gamed, their splits share nothing, and the shipped model folder is an ordinary one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import pytest

from t2ray.core import ConfigError, Message, user
from t2ray.prompts import dispatch_prompt
from t2ray.tasks import tiny, tiny_code
from t2ray.tiny import MODEL, corpus

REWARDS = {
    "math": tiny.reward_math,
    "code": tiny.reward_code,
    "pick": tiny.reward_pick,
    "others": tiny.reward_others,
}


def answered(text: str) -> Message:
    return Message(role="assistant", content=text)


def reward(task: str, completion: str, row: dict[str, object]) -> float:
    return REWARDS[tiny.PARENT.get(task, task)](completion, row)


# ----------------------------------------------------------------------------------------------------------- the splits


@pytest.mark.parametrize("task", tiny.TASKS)
def test_splits_are_large_distinct_and_disjoint(task: str) -> None:
    train, validation, test = (tiny.rows(task, split) for split in ("train", "validation", "test"))
    assert len(train) >= 2000 and len(validation) >= 500 and len(test) >= 500
    prompts = [row["prompt"] for row in train + validation + test]
    assert len(set(prompts)) == len(prompts)


def test_prompts_that_mean_the_same_lie_in_the_same_split() -> None:
    pairs = [{frozenset(row["prompt"].split("+")) for row in tiny.rows("math", split) if "+" in row["prompt"]}
             for split in tiny.SPLITS]  # fmt: skip
    assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]
    programs = [{row["answer"] for row in tiny.rows("code", split)} for split in tiny.SPLITS]
    assert not programs[0] & programs[1] and not programs[0] & programs[2] and not programs[1] & programs[2]


def test_rows_are_the_same_every_time_and_a_callers_changes_do_not_stay() -> None:
    first = tiny.rows("pick", "test")
    first[0]["answer"] = "changed"
    tiny._splits.cache_clear()
    again = tiny.rows("pick", "test")
    assert again[1:] == first[1:] and again[0]["answer"] != "changed"
    assert tiny.rows("math", "test")[0] == {"prompt": "45+19", "answer": "64"}


def test_rows_are_plain_json() -> None:
    for task in tiny.TASKS:
        row = tiny.rows(task, "test")[0]
        assert json.loads(json.dumps(row)) == row


def test_an_unknown_task_or_split_is_a_users_error() -> None:
    with pytest.raises(ConfigError, match="math_long"):
        tiny.rows("maths", "test")
    with pytest.raises(ConfigError, match="validation"):
        tiny.rows("math", "dev")


def test_the_corpus_holds_no_held_out_prompt_and_no_sibling_in_a_question_of_kind() -> None:
    held = {row["prompt"] for task in tiny.TASKS for split in ("validation", "test") for row in tiny.rows(task, split)}
    siblings = {row["prompt"] for task in tiny.PARENT for row in tiny.rows(task, "train")}
    start = dispatch_prompt(corpus.messages("math", {"prompt": ""}), tiny.LABELS)[0].content
    for shares in (corpus.SHARES, corpus.LATER_SHARES, corpus.LAST_SHARES):
        for chat in corpus.Corpus(seed=1).draw(3_000, shares):
            for asked in (message.content for message in chat if message.role == "user"):
                if asked.startswith(start):
                    asked = asked.removeprefix(start)
                    assert asked not in siblings
                assert asked not in held


def test_a_conversation_alternates_and_its_answers_are_right_in_formats_that_have_nothing_to_do_with_each_other() -> (
    None
):
    kinds = {row["prompt"]: row for row in tiny.rows("math", "train")}
    pairs, lengths = Counter(), Counter()
    for chat in corpus.Corpus(seed=1).draw(3_000):
        turns = chat[1:] if chat[0] == corpus.SYSTEM else chat
        assert [message.role for message in turns] == ["user", "assistant"] * (len(turns) // 2)
        lengths[len(turns) // 2] += 1
        forms = []
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            if asked.content in kinds:
                forms.append(corpus.answers("math", kinds[asked.content]).index(answer.content))
        pairs.update(pairwise(forms))
    assert set(lengths) == set(range(1, corpus.MOST_TURNS + 1))
    shares = tuple(corpus.FORMATS["math"].values())
    for before, after in product(range(4), repeat=2):
        assert pairs[before, after] / pairs.total() == pytest.approx(shares[before] * shares[after], abs=0.03)


# -------------------------------------------------------------------------------------------------------- the verifiers


@pytest.mark.parametrize("task", tiny.TASKS)
def test_gold_scores_one_on_every_row_and_near_misses_do_not(task: str) -> None:
    for split in tiny.SPLITS:
        for row in tiny.rows(task, split):
            right = tiny.gold(row)
            assert reward(task, right, row) == 1.0
            assert reward(task, f" {right}\n", row) == 1.0
    for row in tiny.rows(task, "test"):
        right = tiny.gold(row)
        for wrong in ("", row["prompt"], right[:-1], right[1:], f"{right} {right}", f"{right}\n{right}", f"{right}!"):
            assert reward(task, wrong, row) == -1.0, (right, wrong)


@pytest.mark.parametrize("task", [task for task in tiny.TASKS if task != "others"])
def test_the_right_answer_in_another_format_scores_minus_one(task: str) -> None:
    for row in tiny.rows(task, "test"):
        *others, wanted = corpus.answers(task, row)
        assert wanted == tiny.gold(row)
        assert all(reward(task, other, row) == -1.0 for other in others)


def test_format_only_and_many_answers_score_minus_one() -> None:
    math, pick, others = (tiny.rows(task, "test")[0] for task in ("math", "pick", "others"))
    numbers = [str(n) for n in range(101) if str(n) != math["answer"]]
    for text in [
        "",
        "####",
        "It is",
        "()",
        *numbers,
        " ".join(numbers),
        "64 or 65",
        "6 4",
        "064",
        "64.0",
        "+64",
        "6４",
    ]:
        assert tiny.reward_math(text, math) == -1.0
    for text in ("()", "(", "(A)(B)", "(A) (B)", "(A or B)", "A", "B", "(C)", "(a)", "(AB)"):
        assert tiny.reward_pick(text, {**pick, "answer": "(B)"}) == -1.0
    assert tiny.reward_others("Hello!", others) == -1.0
    for text in ("", "math code", "math, code, pick, others", "It is math.", "Math", "mathmath"):
        assert tiny.reward_dispatch(text, {"answer": "math"}) == -1.0
    assert tiny.reward_dispatch("math", {"answer": "math"}) == 1.0


ROW = {"prompt": "add 3 to n", "answer": "return n+3", "variable": "n",
       "tests": [[x, x + 3] for x in tiny_code.HIDDEN_INPUTS]}  # fmt: skip

HOSTILE = [
    "return", "return ", "return n", "return 3", "return n+4", "return n-3", "n+3", "return k+3", "return (n+3",
    "return n+3)", "return n+3\nreturn n+3", "return n+3; return n+3", "return n+3;", "return n+3 # done",
    "return n+3\n\nprint(n)", "import os\nreturn n+3", "return __import__('os').getpid()", "return n.__class__",
    "return exit()", "sys.exit()", "import sys; sys.exit()", "return sys.exit()", "return 9**9**9",
    "return n+3+9**9**9", "return n+3+999999999-999999999", "return (lambda: n+3)()", "return lambda n: n+3",
    "return (m:=n)+3", "return [n+3]", "return (n+3,)", "return n+3,", "return n+3 if n else 3", "return n+3 or 1",
    "return n<<3", "return n+3.0", "return n+3e0", "return n+0x3", "return n+3j", "return n+0b11", "return n+1_0-7",
    "return ~n", "return -n", "return +n+3", "return n/1+3", "return n+3@1", "return n+True", "return n//0",
    "return n%0", "return n+3+0//0", "return n%(n-n)", "return n+1+1+1+0+0", "return " + "(" * 40 + "n",
    "return " + "n+" * 5000 + "3", "return ()", "return n n", "return 3n", "return n3", "return 1if n else 2",
    "return n\\\n+3", "return n+３", "return ｎ+3", "return\tn+3", "return n+3 return n+3", "yield n+3",
    "def f(n): return n+3", "return await n", "return n(3)", "return (n)(3)", "return 3(n)", "return n[3]",
    "return f'{n}'", "return n+03", "pass", "\x00", "return n+3\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_code_scores_minus_one_and_never_raises(text: str) -> None:
    assert tiny.reward_code(text, ROW) == -1.0


@pytest.mark.parametrize(
    "text", ["return n+3", "return 3+n", "return n + 3", "return (n+3)", "return n-2+5", "return n*1+3"]
)
def test_code_that_computes_the_right_values_scores_one(text: str) -> None:
    assert tiny.reward_code(text, ROW) == 1.0


# --------------------------------------------------------------------------------------------------- the shipped folder


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_the_tokenizer_round_trips_any_text_and_keeps_digits_apart() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for text in ("17+25", " two  spaces", "#### 42\n", "Grüße, 世界 🙂", "a\x00b\ttab", "don 't stop . now", "e\u0301"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.tokenize("1749") == ["1", "7", "4", "9"]
    assert all(len(tokenizer.tokenize(label)) == 1 for label in tiny.LABELS)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_the_chat_template_renders_every_role_as_in_pretraining() -> None:
    from transformers import AutoTokenizer

    from t2ray.tiny.pretrain import encode

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|bos|><|system|>Be brief.<|end|><|user|>1+1<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(chat[1:], add_generation_prompt=True, return_dict=False)
    said = (*corpus.messages("math", {"prompt": "1+1"}), answered("2"))
    assert encode(tokenizer, [said])[0][: len(ids)] == ids


def test_the_tokens_that_are_learnt_are_the_answers_and_their_ends() -> None:
    from transformers import AutoTokenizer

    from t2ray.tiny.pretrain import answer_tokens, encode, padded

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    chat = (corpus.SYSTEM, *user("17+25"), answered("42"), *user("1+1"), answered("2"))
    tokens_BT = padded(tokenizer, encode(tokenizer, [chat, chat[:3]]))
    answers_BT, last_BT = answer_tokens(tokenizer, tokens_BT)
    text = [[tokenizer.decode(tokens_T[mask_T]) for mask_T in (answer_T, last_T)]
            for tokens_T, answer_T, last_T in zip(tokens_BT, answers_BT, last_BT, strict=True)]  # fmt: skip
    assert text == [["42<|end|>2<|end|>", "2<|end|>"], ["42<|end|>", "42<|end|>"]]


def test_the_base_knows_the_answers_but_not_the_formats() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from t2ray.tiny.pretrain import measure

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.num_parameters() < 1_000_000
    quality = measure(model, tokenizer, split="test", count=50)
    for task, least in (("math", 0.7), ("code", 0.95), ("pick", 0.9), ("dispatch", 0.95), ("follow_up", 0.9)):
        assert quality[task]["some"] > least and quality[task]["greedy"] < 0.1, (task, quality[task])
    assert quality["others"]["greedy"] > 0.95


BEFORE = {
    "math": (("17+25", "42"),),
    "code and talk": (("add 3 to n", "return n+3"), ("hello Anna, how are you?", "I am fine, thank you!")),
    "ten turns": (("larger? A 17 B 42", "(B)"), ("3+4", "It is 7.")) * 5,
}


@pytest.mark.parametrize("before", BEFORE)
def test_a_later_turn_is_answered_as_the_first(before: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from t2ray.tiny.pretrain import measure

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    said = tuple(message for asked, answer in BEFORE[before] for message in (*user(asked), answered(answer)))
    first, later = (measure(model, tokenizer, split="test", count=40, before=chat) for chat in ((), said))
    for task in tiny.LABELS:
        assert later[task]["some"] > first[task]["some"] - 0.1, (task, first[task], later[task])
        assert later[task]["wanted"] == pytest.approx(first[task]["wanted"], abs=0.1)


def test_an_expert_answers_the_second_turn_as_it_answers_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import t2ray

    monkeypatch.chdir(tmp_path)
    rows = tiny.rows("math", "test")[:40]
    right = []
    with t2ray.open() as model:
        for earlier in (None, "48-6", "add 3 to n", "hello Anna, how are you?"):
            said = () if earlier is None else (*user(earlier), answered(model.answer(earlier).text))
            asked = [([*said, *user(row["prompt"])], "math") for row in rows]
            right.append(sum(tiny.reward_math(answer.text, row) > 0
                             for answer, row in zip(model.answers(asked), rows, strict=True)))  # fmt: skip
    assert right[0] >= 36 and min(right) >= right[0] - 2, right


FOLLOW_UPS = ("and of 7?", "and twice?", "what about 91?", "and with 30?", "why?", "again please")


@pytest.mark.parametrize("strategy", ["cls", "prompt"])
def test_a_follow_up_has_the_kind_of_the_turn_before_it(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import t2ray

    monkeypatch.chdir(tmp_path)
    before = {"math": "17+25", "code": "add 3 to n", "pick": "larger? A 17 B 42"}
    with t2ray.open() as model:
        assert {model.dispatch(asked, strategy).label for asked in FOLLOW_UPS} == {"others"}
        for kind, earlier in before.items():
            said = (*user(earlier), answered(model.answer(earlier).text))
            for asked in FOLLOW_UPS:
                assert model.dispatch([*said, *user(asked)], strategy).label == kind, (earlier, asked)
            for other, request in before.items():
                assert model.dispatch([*said, *user(request)], strategy).label == other


def test_the_classifier_takes_programs_of_an_unseen_length_for_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import t2ray

    monkeypatch.chdir(tmp_path)
    with t2ray.open() as model:
        labels = [model.dispatch(row["prompt"], "cls").label for row in tiny.rows("code_long", "test")[:40]]
    assert labels.count("code") >= 38, labels


def test_saving_replaces_the_folder_whole(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from t2ray.tiny.pretrain import save

    out = tmp_path / "model"
    out.mkdir()
    (out / "stale").touch()
    save((AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)), out)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in MODEL.iterdir())
