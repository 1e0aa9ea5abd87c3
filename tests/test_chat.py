"""Messages to ids and back, with a chat template and without."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer

from t2ray.core import ConfigError, Message, user
from t2ray.engine.text import TextStream
from t2ray.models.chat import Chat


@pytest.fixture
def chat(tiny_llama: Path) -> Chat:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return Chat(tokenizer, [tokenizer.eos_token_id])


def test_a_prompt_ends_where_the_answer_begins(chat: Chat) -> None:
    ids = chat.encode((Message(role="system", content="s"), *user("Hi")))
    assert chat.tokenizer.convert_ids_to_tokens(ids) == [
        "<|system|>", "s", "<|end|>", "<|user|>", "H", "i", "<|end|>", "<|assistant|>",
    ]  # fmt: skip


def test_an_answer_ends_with_the_end_of_the_turn_and_decodes_to_its_text(chat: Chat) -> None:
    ids = chat.encode_answer("return n + 3  .")
    assert ids[-1:] == chat.eos_ids
    assert chat.decode(ids) == "return n + 3  ."


def test_prompt_and_answer_are_the_whole_conversations_ids(chat: Chat) -> None:
    """What training and scoring see is what the template makes of the finished conversation."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    whole = chat.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert list(chat.encode(user("Hi")) + chat.encode_answer("Ho")) == whole


def test_without_a_template_contents_are_plain_text_that_goes_on(chat: Chat) -> None:
    chat.tokenizer.chat_template = None
    ids = chat.encode((Message(role="system", content="Once "), *user("upon")))
    assert chat.decode(ids) == "Once upon"
    assert chat.encode_answer(" a") == tuple(chat.tokenizer(" a")["input_ids"])


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_a_template_that_refuses_is_a_mistake_in_the_conversation_in_the_templates_words(chat: Chat) -> None:
    chat.tokenizer.chat_template = REFUSES + "{{ messages[1].content.nothing.at_all }}"
    with pytest.raises(ConfigError, match=r"refuses this conversation \(system\): System role not supported"):
        chat.encode((Message(role="system", content="s"),))
    with pytest.raises(ConfigError, match=r"refuses this conversation \(user\): .*undefined|has no element"):
        chat.encode(user("x"))


HERMES = """{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}
{%- for m in messages %}{{ m.role }}:{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments.a + 1 }}</tool_call>
{%- endfor %}{{ m.tool_call_id or '' }}{{ m.name or '' }};{% endfor %}"""
TOOLS = Message(role="tools", content='[{"type": "function", "function": {"name": "add"}}]')


def test_a_template_is_told_of_tools_of_calls_and_of_their_results(chat: Chat) -> None:
    chat.tokenizer.chat_template = HERMES
    call = '[{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 41}"}}]'
    conversation = (
        TOOLS,
        *user("1+2"),
        Message(role="assistant", content="", calls=call),
        Message(role="tool", content="3", call_id="c1"),
    )
    assert chat.decode(chat.encode(conversation)) == (
        "[add]user:1+2;assistant:<tool_call>add 42</tool_call>;tool:3c1add;"
    )
    assert chat.decode(chat.encode(user("1+2"))) == "user:1+2;"


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (HERMES, "hermes"),
        ('{% if tools %}Answer {"name": name, "parameters": arguments}{% endif %}', "llama"),
        ("{% for m in messages %}the <tool_call> of nothing{% endfor %}", None),
        ("{% if tools %}in a way of its own{% endif %}", None),
        ("{% if tools %}<tool_call>\n<function=add></function></tool_call>{% endif %}", "xml"),
        ("{% if tools %}[TOOL_CALLS]{{ calls }}{% endif %}", "mistral"),
        ("{% if tools %}Answer [func_name1(params_name1=params_value1, ...), func_name2(params)]{% endif %}", "python"),
        ({"default": "{{ messages }}", "tool_use": HERMES}, "hermes"),
        (None, None),
    ],
)
def test_a_template_shows_how_calls_are_written(chat: Chat, template: Any, style: str | None) -> None:
    chat.tokenizer.chat_template = template
    assert chat.tools == style


def test_the_signs_of_mistrals_calls_are_a_part_of_the_text_though_they_are_special(chat: Chat) -> None:
    chat.tokenizer.add_tokens([AddedToken(sign, special=True) for sign in ("[TOOL_CALLS]", "[ARGS]", "[INST]")])
    told = Chat(chat.tokenizer, chat.eos_ids)
    text = "Yes. [TOOL_CALLS]add[ARGS]{}"
    ids = told.encode_answer(text.replace("add", "[INST]add"))
    stream = TextStream(told, ())
    assert told.decode(ids) == "".join([*map(stream.push, ids), stream.finish()]) == text


THINKS = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}</think>{% endfor %}{{ '<think>\n' }}"


def test_a_template_that_opens_reasoning_is_noticed_and_is_told_of_earlier_reasoning(chat: Chat) -> None:
    assert not chat.thinks and not chat.opens(chat.encode_text("<think>\n"))
    chat.tokenizer.chat_template = THINKS
    ids = chat.encode((Message(role="assistant", content="x", reasoning="hm"), *user("y")))
    assert chat.decode(ids) == "hmx</think>y</think><think>\n"
    assert chat.thinks and chat.opens(ids) and not chat.opens(chat.encode_text("a <think> b"))


def test_mistrals_reasoning_is_told_though_its_signs_are_special_tokens(chat: Chat) -> None:
    chat.tokenizer.add_tokens([AddedToken(sign, special=True) for sign in ("[THINK]", "[/THINK]")])
    chat.tokenizer.chat_template = THINKS.replace("</think>", "[/THINK]").replace("<think>", "[THINK]")
    told = Chat(chat.tokenizer, chat.eos_ids)
    assert told.thinks and told.opens(told.encode(user("y"))) and not told.opens(told.encode_text("[THINK] y"))
    assert told.decode(told.encode_answer("[THINK]hm[/THINK]3")) == "[THINK]hm[/THINK]3"


def test_text_survives_byte_for_byte(chat: Chat) -> None:
    for text in ("", " ", "#### 42", "a\n\nb", "ä 日本 🙂", " ,. don ' t"):
        assert chat.decode(chat.encode_answer(text)) == text


def test_the_end_token_pads_where_the_tokenizer_has_no_padding_token(chat: Chat) -> None:
    chat.tokenizer.pad_token = None
    assert Chat(chat.tokenizer, [7, 8]).pad_id == 7


def test_a_template_gets_what_a_job_says_and_the_day_that_the_run_began(chat: Chat) -> None:
    chat.tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% if not thinking %} quick{% endif %}{{ messages[0].content }}"
    )
    chat.tell_date(date(2026, 1, 31))
    assert chat.decode(chat.encode(user("?"))) == "31 Jan 2026 quick?"
    chat.template = {"thinking": True}
    assert chat.decode(chat.encode(user("?"))) == "31 Jan 2026?"
    own = Message(role="template", content='{"thinking": false}')
    assert chat.decode(chat.encode((*user("?"), own))) == "31 Jan 2026 quick?"
    chat.template = {"chat_template": "another"}
    with pytest.raises(ConfigError, match="chat_template_kwargs has 'chat_template', which t2ray itself says"):
        chat.encode(user("?"))


def test_a_raw_text_that_begins_with_the_token_that_begins_texts_gets_no_second_one(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, bos_token="<|system|>")
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    chat = Chat(tokenizer, [tokenizer.eos_token_id])
    assert chat.encode_text("Hi")[0] == bos
    assert chat.encode_text("<|system|>Hi") == chat.encode_text("Hi")
    assert chat.encode_text("<|system|><|system|>Hi") == (bos, *chat.encode_text("Hi"))
