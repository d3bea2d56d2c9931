"""Conversations in data: their forms, chat templates, and which tokens count."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from qlora_kernels.errors import InputError
from qlora_kernels.finetune import data, tiny
from qlora_kernels.finetune.data import Chat, Place, read_records

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: what was thought is shown for the last turn alone.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }};"
    "{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
)
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4 ☃"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


def chat(template: str, tokenizer=None) -> Chat:
    return Chat(tokenizer or tiny.tokenizer(), template, "the template")


def rows_of(tmp_path, *rows, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_records(Place(str(path)))[0].rows


def learned(template: str, conversation) -> list[str]:
    """The text of each span that counts."""
    example = chat(template).example(conversation)
    return [bytes(example.ids[begin:end]).decode() for begin, end in example.spans]


def test_every_turn_of_the_assistant_counts_and_nothing_else(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    assert learned(CHATML, row) == ["4 ☃<|im_end|>\n", "6<|im_end|>\n"]
    whole = bytes(chat(CHATML).example(row).ids).decode()
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?")


def test_markers_and_prefixes_find_the_same_tokens(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    plain = re.sub(r"{% (end)?generation %}", "", MARKED) + "{% if add_generation_prompt %}[assistant]{% endif %}"
    by_markers, by_prefixes = (chat(template).example(row) for template in (MARKED, plain))
    assert by_markers == by_prefixes
    assert learned(MARKED, row) == ["4 ☃;", "6;"]


def test_markers_agree_with_transformers(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    example = chat(MARKED).example(row)
    theirs = tiny.tokenizer().apply_chat_template(
        TWO_TURNS, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [0] * len(example.ids)
    for begin, end in example.spans:
        mask[begin:end] = [1] * (end - begin)
    assert example.ids == theirs["input_ids"]
    assert mask == theirs["assistant_masks"]


def test_a_template_without_stable_prefixes_is_refused_and_markers_or_weights_help(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    with pytest.raises(InputError, match=r"line 1: .* differently once more follow.*{% generation %}.*\"weight\": 0"):
        chat(THINKING).example(row)
    first, last = TWO_TURNS[2] | {"weight": 0}, TWO_TURNS[4] | {"weight": 1}
    (row,) = rows_of(tmp_path, {"messages": [*TWO_TURNS[:2], first, TWO_TURNS[3], last]})
    assert learned(THINKING, row) == ["<think></think>6;"]
    marked = THINKING.replace("{{ m.content }};", "{% generation %}{{ m.content }};{% endgeneration %}")
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS[3:]})
    assert learned(marked, row)[-1] == "6;"


def test_a_header_may_open_a_thought_that_a_past_turn_does_not_show(tmp_path):
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    assert learned(template, row) == ["4 ☃<|im_end|>\n", "6<|im_end|>\n"]


def test_a_template_may_want_arguments_as_text(tmp_path):
    call = {"function": {"name": "add", "arguments": {"a": "é"}}}
    (row,) = rows_of(tmp_path, {"messages": [TWO_TURNS[1], {"role": "assistant", "content": "", "tool_calls": [call]}]})
    written = "{{ m.tool_calls[0].function.name + ' ' + m.tool_calls[0].function.arguments }}"
    template = CHATML.replace("{{ m.tool_calls | tojson }}", written)
    assert learned(template, row) == ['add {"a": "é"}<|im_end|>\n']


def test_a_template_may_end_every_text_as_a_document_ends(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    example = chat(template).example(row)
    assert [bytes(i for i in example.ids[b:e] if i < 256).decode() for b, e in example.spans] == [
        *("4 ☃<|im_end|>\n", "6<|im_end|>\n")
    ]
    assert example.ids[-1] == tiny.END
    assert example.spans[-1][1] == len(example.ids)


# Templates of models as TRL has them, beside copies with markers that learn from the same tokens.
PLAIN_AND_MARKED = (
    "llama3",
    "gemma3",
    "phi3",
    "phi3_5",
    "cohere",
    "cohere2",
    "lfm2",
    "qwen3_instruct_2507",
    "qwen3_vl",
)


@pytest.mark.parametrize("name", PLAIN_AND_MARKED)
def test_templates_of_models(tmp_path, name):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    plain, marked = folder / f"{name}.jinja", folder / f"{name}_training.jinja"
    if not plain.is_file() or not marked.is_file():
        pytest.skip(f"this TRL has no templates for {name}")
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    examples = [chat(path.read_text(), tokenizer).example(row) for path in (plain, marked)]
    texts = [[bytes(i for i in e.ids[b:c] if i < 256).decode().strip() for b, c in e.spans] for e in examples]
    assert texts[0] == texts[1]
    assert [text[:1] for text in texts[0]] == ["4", "6"]


@pytest.mark.parametrize("thought", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_an_answer_may_begin_as_the_thought_that_a_header_opens(tmp_path, thought):
    template = CHATML.replace("assistant\n{% endif %}", f"assistant\n{thought}{{% endif %}}")
    answers = ["<b>4</b>", "", "<think>\nno\n</think>6"]
    turns = [{"role": role, "content": text} for text in answers for role, text in (("user", "?"), ("assistant", text))]
    (row,) = rows_of(tmp_path, {"messages": turns})
    promised = len("<think>\n") if thought == "<think>\n" else 0  # the header has these tokens, of the last answer too
    assert learned(template, row) == [f"{answer}<|im_end|>\n" for answer in (*answers[:2], answers[2][promised:])]


@pytest.mark.parametrize("prompt", ["{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""])
@pytest.mark.parametrize("answer", ["Hello", "x", "x y", ""])
def test_what_stands_before_a_first_message_of_the_assistant_does_not_count(tmp_path, prompt, answer):
    template = "<|im_start|>system\nYou are good.<|im_end|>\n" + CHATML[: CHATML.index("{% if add_gen")] + prompt
    (row,) = rows_of(tmp_path, {"messages": [{"role": "assistant", "content": answer}, *TWO_TURNS[1:]]})
    assert learned(template, row)[0] == f"{answer}<|im_end|>\n"


def test_a_call_may_be_the_first_message(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]}
    (row,) = rows_of(tmp_path, {"messages": [call, *TWO_TURNS[1:]]})
    assert learned(CHATML, row)[0].startswith('[{"type": "function"')


def test_half_surrogate_pairs_are_replaced_wherever_they_stand(tmp_path):
    half = "\ud800"
    turn = {"role": "assistant", "content": f"a{half}", "tool_calls": [{"name": f"f{half}", "arguments": {half: half}}]}
    (row,) = rows_of(tmp_path, {"messages": [TWO_TURNS[1], turn], "tools": [{"name": half}]})
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    assert learned(template, row)[0].startswith('a?[{"type": "function", "function": {"name": "f?"')


def test_a_template_may_end_with_space(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    assert learned(CHATML + " \n\n", row) == ["4 ☃<|im_end|>", "6<|im_end|>\n \n"]


def test_sharegpt_and_columns_and_json_in_a_table_are_the_same_conversation(tmp_path):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in TWO_TURNS]
    columns = {"role": [m["role"] for m in TWO_TURNS], "content": [m["content"] for m in TWO_TURNS]}
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}], "tool_calls": None} for m in TWO_TURNS]
    rows = rows_of(
        tmp_path,
        *({"conversations": shared}, {"conversations": TWO_TURNS}, {"messages": columns}, {"messages": parts}),
        *({"messages": json.dumps(TWO_TURNS)}, {"system": "Be brief.", "conversations": shared[1:]}),
    )
    assert all(row.messages == TWO_TURNS and row.learned == (2, 4) for row in rows)


def test_pairs_of_messages_count_completions_only(tmp_path):
    (row,) = rows_of(tmp_path, {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]})
    assert learned(CHATML, row) == ["6<|im_end|>\n"]
    assert learned(MARKED, row) == ["[assistant]6;"]


def test_tools_reach_the_template_or_are_an_error(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"sum": "4"}'},
        {"role": "assistant", "content": "4"},
    ]
    shared = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": '{"sum": "4"}'},
        {"from": "gpt", "value": "4"},
    ]
    row, other = rows_of(tmp_path, {"messages": messages}, {"messages": shared})
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert '"arguments": {"a": 2}' in learned(CHATML, row)[0]
    assert [{**m, "tool_calls": None} for m in other.messages] == [{**m, "tool_calls": None} for m in row.messages]
    with pytest.raises(InputError, match="line 1: the template leaves out the call of add in message 2"):
        chat(CHATML.replace("{{ m.tool_calls | tojson }}", "")).example(row)
    tools = [{"type": "function", "function": {"name": "subtract", "parameters": {}}}]
    (row,) = rows_of(tmp_path, {"messages": messages, "tools": json.dumps(tools)})
    with pytest.raises(InputError, match="leaves out the tools"):
        chat(CHATML).example(row)
    for name in ("subtract", "add"):  # a tool's name is no call of it
        (row,) = rows_of(tmp_path, {"messages": messages, "tools": json.dumps(tools).replace("subtract", name)})
        with pytest.raises(InputError, match="leaves out the call of add"):
            chat("{{ tools | tojson }}" + CHATML.replace("{{ m.tool_calls | tojson }}", "")).example(row)
    (row,) = rows_of(tmp_path, {"messages": messages, "tools": json.dumps(tools)})
    assert "subtract" in bytes(chat("{{ tools | tojson }}" + CHATML).example(row).ids).decode()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
            "message 1 .system",
        ),
        ("{{ raise_exception('no system role') }}", r"line 1: the template cannot be applied \(no system role\)"),
        ("{% for %}", "the template cannot be applied"),
        ("Be brief.", "writes nothing for the assistant's turns"),
    ],
)
def test_templates_that_refuse_or_leave_out(tmp_path, template, words):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    with pytest.raises(InputError, match=words):
        chat(template).example(row)


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, r"line 1: expected a list of messages"),
        ({"messages": 5}, "expected a list of messages"),
        ({"messages": "[1"}, "not JSON"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no message of the assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2: 'weight' should be 0 or 1"),
        ({"messages": ["a"]}, "message 1: expected an object with 'role'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1: 'role' should be one of .*'robot'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: the content should be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1: .*'image_url'; only text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": 1}]}]}, "message 2: a call of a tool"),
        ({"messages": [USER, {**ANSWER, "function_call": {}}]}, "give the call in 'tool_calls'"),
        ({"messages": [{"from": "alien", "value": "a"}]}, "message 1: 'from' should be one of"),
        ({"messages": [{"from": "gpt", "value": "a", "weight": 0.5}]}, "message 1: 'weight' should be 0 or 1"),
        ({"messages": [{"from": "gpt", "value": "a", "weight": "0"}]}, "message 1: 'weight' .* found '0'"),
        ({"messages": [{"from": "function_call", "value": '{"name": "f"}', "weight": 0}]}, "no message of the"),
        ({"messages": [USER, ANSWER], "tools": 5}, "'tools' should be a list"),
        ({"question": "a", "answer": "b"}, "expected an object with 'messages'.*found the keys question, answer"),
    ],
)
def test_rows_that_are_no_conversation(tmp_path, row, words):
    with pytest.raises(InputError, match=words):
        rows_of(tmp_path, row)


def test_all_rows_are_of_the_first_one_s_kind(tmp_path):
    with pytest.raises(InputError, match=r"line 2: expected an object with 'messages', as in the rows before it"):
        rows_of(tmp_path, {"messages": [USER, ANSWER]}, {"prompt": "a", "completion": "b"})


def test_instructions_are_conversations_where_there_is_a_template_and_pairs_elsewhere(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"Add {i}.", "input": "2" if i else "", "output": "3"} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    for made, expected in (
        (None, "### Instruction:\nAdd 1.\n\n### Input:\n2\n\n### Response:\n3"),
        (chat(CHATML), "<|im_start|>user\nAdd 1.\n\n2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"),
    ):
        loaded = data.load_data(str(path), tiny.encode, tiny.END, 256, 0.25, 0, chat=lambda made=made: made)
        examples = [*loaded.train.examples, *loaded.held_out.examples]
        assert expected in [bytes(i for i in example.ids if i < 256).decode() for example in examples]
        assert loaded.summary["kind"] == "instructions"
        assert ("chat_template" in loaded.summary) == (made is not None)


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}))
    with pytest.raises(InputError, match="no chat template; give one with --chat-template FILE"):
        data.load_data(str(path), tiny.encode, tiny.END, 32, 0.1, 0)


def test_long_conversations_keep_a_turn_to_learn_from():
    example = data.Example(list(range(100)), ((10, 20), (60, 70)))
    assert example.cut(100) == example
    cut = example.cut(64)
    assert (cut.ids, cut.spans) == (list(range(64)), ((10, 20), (60, 64)))
    late = data.Example(list(range(100)), ((90, 100),)).cut(32)
    assert (late.ids, late.spans) == (list(range(68, 100)), ((22, 32),))


def test_labels_follow_spans():
    batch = data.Examples([data.Example([1, 2, 3, 4, 5, 6], ((0, 2), (4, 5)))], 16, 0, 0).batch(0, 1)
    assert batch.labels.tolist() == [[2, -100, -100, 5, -100]]


def test_the_tiny_model_s_template(tmp_path):
    (row,) = rows_of(tmp_path, {"messages": TWO_TURNS})
    example = chat(tiny.CHAT_TEMPLATE).example(row)
    assert bytes(i if i < 256 else ord("$") for i in example.ids).decode() == (
        "system: Be brief.\nuser: 2 + 2?\nassistant: 4 ☃$user: And 3 + 3?\nassistant: 6$"
    )
    assert [example.ids[end - 1] for _, end in example.spans] == [tiny.END, tiny.END]
    assert [bytes(example.ids[begin : end - 1]).decode() for begin, end in example.spans] == ["4 ☃", "6"]
