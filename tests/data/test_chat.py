"""Chat: what is rendered, what is learned, what is cut, and what is refused."""

from __future__ import annotations

import json

import pytest

from lora_lightning.data import Chat
from lora_lightning.data.chats.templates import TEMPLATES
from lora_lightning.data.inspect import show_examples
from lora_lightning.data.tokens.marks import mark
from lora_lightning.errors import DataError


def unmarked(template: str) -> str:
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TWO = [*HI, {"role": "user", "content": "tea?"}, {"role": "assistant", "content": "yes\nplease"}]
SYSTEM = {"role": "system", "content": "be kind"}
CHATML = TEMPLATES["chatml"].jinja(start="")
UNMARKED = unmarked(CHATML)
SHORT_MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
FORGETFUL = (  # as templates that drop the reasoning of earlier answers
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(thinking) "
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKING = (
    "assistant' %}{% generation %}{% if loop.last %}(thinking) {% endif %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def make(write, letters):
    tokenizer = letters()

    def make(rows, **settings) -> Chat:
        settings = {"tokenizer": tokenizer, "chat_template": "chatml", "validation_fraction": 0.0, **settings}
        rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
        return Chat(train=write("train.jsonl", "\n".join(map(json.dumps, rows))), **settings)

    return make


def shown(data: Chat, split: str = "train") -> list[str]:
    data.setup("predict" if split == "predict" else "fit")
    examples = data.examples(split)
    return [mark(row["input_ids"], row["labels"], data.tokenizer_object) for row in examples]


def fails(data: Chat, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.setup("fit")


# -- what is learned ---------------------------------------------------------------------------------------------------

EXPECTED = (
    "[[<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n]]hello<|im_end|>"
    "[[\n<|im_start|>user\ntea?<|im_end|>\n<|im_start|>assistant\n]]yes\nplease<|im_end|>[[\n]]"
)


def test_loss_is_on_assistant_turns_and_their_ends(make):
    assert shown(make([TWO])) == [EXPECTED]


@pytest.mark.parametrize("template", [UNMARKED, SHORT_MARKS])
def test_templates_without_marks_or_with_short_ones(make, template):
    assert shown(make([TWO], chat_template=template)) == [EXPECTED]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.startswith("phi")])
def test_marks_are_those_of_transformers(make, name):
    data = make([[SYSTEM, *TWO]], chat_template=name)
    shown(data)
    row = data.examples("train")[0]
    theirs = data.tokenizer_object.apply_chat_template(
        [SYSTEM, *TWO], return_dict=True, return_assistant_tokens_mask=True
    )
    assert row["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in row["labels"]] == theirs["assistant_masks"]


def test_named_templates(make):
    assert shown(make([[SYSTEM, *HI]], chat_template="plain")) == [
        "[[System:\nbe kind\nUser:\nhi\nAssistant:\n]]hello</s>[[\n]]"
    ]
    assert shown(make([HI], chat_template="zephyr")) == ["[[<|user|>\nhi</s>\n<|assistant|>\n]]hello</s>[[\n]]"]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    llama = f"[[{header.format('user')}hi<|eot_id|>{header.format('assistant')}]]hello<|eot_id|>"
    assert shown(make([HI], chat_template="llama-3")) == [llama]


def test_only_the_last_turn(make):
    expected = EXPECTED.replace("]]hello<|im_end|>[[", "hello<|im_end|>")
    for template in ("chatml", UNMARKED):
        assert shown(make([TWO], turns="last", chat_template=template)) == [expected]


def test_turns_behind_the_last_answer_are_left_out(make):
    assert shown(make([[*TWO, {"role": "user", "content": "bye"}]])) == [EXPECTED]


def test_one_start_token(make, letters):
    plain = make([HI], tokenizer=letters(start=True), chat_template="plain")
    assert shown(plain) == ["[[<s>User:\nhi\nAssistant:\n]]hello</s>[[\n]]"]
    own = make([HI], tokenizer=letters(start=True, template="{{ bos_token }}" + UNMARKED), chat_template=None)
    assert shown(own)[0].count("<s>") == 1


def test_blanks_without_tokens_do_not_stretch_the_marks(make, causal_tokenizer):
    """A word-level tokenizer has no token for the blank at which this marked text ends."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}what {{ m.content }} {% else %}"
        "{% generation %} {{ m.content }} {% endgeneration %}is {% endif %}{% endfor %}"
    )
    rows = [[{"role": "user", "content": "tea"}, {"role": "assistant", "content": "good"}] * 2]
    assert shown(make(rows, tokenizer=causal_tokenizer, chat_template=template)) == [
        "[[what tea]]good[[is what tea]]good[[is]]"
    ]


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_sharegpt(make):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    turns += [{"from": "human", "value": "tea?"}, {"from": "gpt", "value": "yes\nplease"}]
    assert shown(make([{"conversations": turns}])) == [EXPECTED]
    assert shown(make([{"talk": turns}], messages="talk")) == [EXPECTED]
    assert shown(make([{"conversations": json.dumps(turns)}])) == [EXPECTED]


def test_tools_and_their_calls(make):
    described = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "35"},
        {"role": "assistant", "content": "yes"},
    ]
    texts = [
        shown(make([{"messages": turns, "tools": given}], chat_template=TOOLS))[0]
        for given in (described, json.dumps(described))
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith('[[<|im_start|>system\n[{"type": "function", "function": {"name": "weather"')
    assert ']]{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>[[' in texts[0]
    assert "tool\n35<|im_end|>\n<|im_start|>assistant\n]]yes<|im_end|>[[\n]]" in texts[0]
    message = r'^train\.jsonl, line 1: Chat\.messages has tools, which the chat template "chatml" leaves out\.'
    fails(make([{"messages": HI, "tools": described}]), message)
    fails(make([{"messages": turns}]), r"^train\.jsonl, line 1: Chat\.messages has tool_calls, which the chat template")


# -- truncation --------------------------------------------------------------------------------------------------------


def test_first_exchanges_go_and_the_system_turn_stays(make):
    whole = make([[SYSTEM, *TWO]])
    shown(whole)
    data = make([[SYSTEM, *TWO]], max_length=len(whole.examples("train")[0]["input_ids"]) - 1)
    assert shown(data) == shown(make([[SYSTEM, *TWO[2:]]]))
    assert data.examples("train")["truncated"][:] == [True]


def test_then_tokens_go_on_the_right(make):
    (text,) = shown(make([HI], max_length=24))
    assert text == "[[<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n]]hel"


def test_what_keeps_nothing_to_learn_is_dropped_counted_and_said(make, caplog):
    long = [{"role": "user", "content": "x" * 50}, HI[1]]
    data = make([HI, long, [HI[0]], TWO], max_length=32)
    texts = shown(data)
    assert len(texts) == 2
    assert data.examples("train")["index"][:] == [0, 3]
    assert all("]]" in text for text in texts)
    assert data.dropped == {"train": 2}
    assert "Chat: left 2 of 4 train rows out: " in caplog.text
    assert "1 that max_length leaves nothing to learn in" in caplog.text
    assert "1 without an assistant turn" in caplog.text
    assert "dropped from train: 2 examples without a token to learn" in show_examples(data)
    fails(make([long], max_length=32), r"^Chat\.train: nothing is left of 1 conversations: 1 that max_length leaves")


# -- prediction --------------------------------------------------------------------------------------------------------


def test_to_predict_the_last_turn_is_answered(make, write):
    rows = [{"messages": TWO[:3]}, {"messages": TWO}]
    data = make([HI], predict=write("new.json", rows))
    asked = EXPECTED.partition("yes")[0].replace("]]hello<|im_end|>[[", "hello<|im_end|>")
    assert shown(data, "predict") == [asked, f"{asked}yes\nplease<|im_end|>"]
    short = make([HI], predict=write("new.json", rows), max_length=30)
    cut, answered = shown(short, "predict")
    assert cut == "[[<|im_start|>user\ntea?<|im_end|>\n<|im_start|>assistant\n]]"
    assert answered.endswith("tea?<|im_end|>\n<|im_start|>assistant\n]]yes\nplease<|im_end|>")
    assert short.examples("predict")["truncated"][:] == [True, True]


def test_packing(make):
    data = make([TWO, HI, HI], packing=True, max_length=100)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert (batch["position_ids"] == 0).sum() >= 3
    assert batch["window_tokens"] == sum(sum(n != -100 for n in row) for row in data.examples("train")["labels"])


@pytest.mark.parametrize("template", ["plain", "zephyr", unmarked(TEMPLATES["plain"].jinja("<s>"))])
def test_real_tokens(make, shared, template):
    rows = json.loads((shared / "data/commonsense/ARC-Easy/train.json").read_text())[:20]
    asked = [
        [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}] for r in rows
    ]
    model = str(shared / "models/stories260k")
    data = make([[*one, *asked[0]] for one in asked], tokenizer=model, chat_template=template, max_length=2048)
    data.setup("fit")
    for row, one in zip(rows, data.examples("train"), strict=True):
        learned = [token for token, label in zip(one["input_ids"], one["labels"], strict=True) if label != -100]
        tokenizer = data.tokenizer_object
        assert one["input_ids"].count(tokenizer.bos_token_id) == 1
        assert learned.count(tokenizer.eos_token_id) == 2
        texts = tokenizer.decode(learned).split("</s>")
        assert [text.strip() for text in texts] == [row["output"], rows[0]["output"], ""]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_templates_that_rewrite_earlier_turns(make, caplog):
    """Each turn is learned as it is written where it is the last: what the model is asked for when it answers."""
    first = "[[<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n]](thinking) hello<|im_end|>[[\n]]"
    behind = "[[<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    second = (
        f"{behind}<|im_start|>user\ntea?<|im_end|>\n<|im_start|>assistant\n]](thinking) yes\nplease<|im_end|>[[\n]]"
    )
    marked = FORGETFUL.replace("assistant' and loop.last %}(thinking) {% endif %}{{ m.content }}<|im_end|>\n", MARKING)
    for template in (FORGETFUL, marked):
        assert shown(make([TWO, HI], chat_template=template)) == [first, second, first]
        assert shown(make([TWO], chat_template=template, turns="last")) == [second]
    assert "2 conversations are 3 examples, as the chat template writes answers otherwise" in caplog.text
    only_first = [TWO[0], TWO[1], TWO[2], {**TWO[3], "weight": 0}]
    assert shown(make([only_first], chat_template=FORGETFUL)) == [first]


def test_of_a_conversation_that_is_cut_each_example_is(make):
    """Each keeps its last exchange; the longer one has lost the first."""
    data = make([TWO], chat_template=FORGETFUL, max_length=50)
    assert [text.rpartition("]]")[0].partition("\n")[2].partition("<")[0] for text in shown(data)] == ["hi", "tea?"]
    assert list(data.examples("train")["truncated"]) == [False, True]


def test_templates_in_files_and_those_that_cannot_render(make, tmp_path):
    fails(make([HI], chat_template=None), r"^Chat\.chat_template is null, and the tokenizer ")
    (tmp_path / "mine.jinja").write_text(UNMARKED)
    assert shown(make([TWO], chat_template=str(tmp_path / "mine.jinja"))) == [EXPECTED]
    fails(
        make([HI], chat_template="{{ messages[0].content + 1 }}"),
        r"line 1: Chat\.messages: the chat template .* cannot render it: can only",
    )
    refusing = "{{ raise_exception('roles must alternate') }}"
    fails(make([HI], chat_template=refusing), r"that was given cannot render it: roles must alternate")
    fails(make([HI], chat_template="{% for"), "cannot render it: ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"^train\.jsonl, line 1: Chat\.messages holds no turns; it must be a list of role"),
        ({"text": "hi"}, r"^Chat\.messages is null, and train has the columns text; name the one that holds turns\.$"),
        ({"messages": HI, "tools": "[1]"}, r"messages: tools is no list of tool descriptions"),
        ({"messages": [HI[0]]}, r"^Chat\.train: nothing is left of 1 conversations: 1 without an assistant turn\.$"),
    ],
)  # fmt: skip
def test_rows_of_another_shape(make, row, message):
    fails(make([row]), message)


def test_a_missing_column(make):
    fails(make([HI], messages="mesages"), r'^Chat\.messages is "mesages"; train\.jsonl .* Did you mean "messages"\?$')
    fails(make([HI], tools="tool"), r'^Chat\.tools is "tool"; train\.jsonl has the columns messages')


# -- what turns and rows carry beside texts ----------------------------------------------------------------------------

LEARNED_LAST = EXPECTED.replace("]]hello<|im_end|>[[", "hello<|im_end|>")


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"loss": 0}])
@pytest.mark.parametrize("template", ["chatml", UNMARKED])
def test_turns_that_are_not_to_be_learned_are_read(make, caplog, key, template):
    turns = [TWO[0], {**TWO[1], **key}, *TWO[2:]]
    assert shown(make([turns], chat_template=template)) == [LEARNED_LAST]
    assert "assistant turns are read and not learned: 1 with a weight of 0" in caplog.text
    behind = [*TWO[:3], {**TWO[3], **key}]
    assert shown(make([behind], chat_template=template)) == shown(make([HI], chat_template=template))


@pytest.mark.parametrize("content", ["", None, []])
def test_an_empty_answer_is_not_learned_and_counted(make, caplog, content):
    empty = {"role": "assistant", "content": content}
    assert shown(make([[TWO[0], empty, *TWO[2:]], [HI[0], empty]])) == [LEARNED_LAST.replace("hello", "")]
    assert "assistant turns are read and not learned: 2 that are empty" in caplog.text
    assert "left 1 of 2 train rows out: 1 whose assistant turns are empty or have a weight of 0" in caplog.text


def test_parts_of_text_are_text(make):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert shown(make([[HI[0], {"role": "assistant", "content": parts}]])) == shown(make([HI]))
    assert shown(make([[HI[0], {"role": "assistant", "content": 0}]]))[0].endswith("]]0<|im_end|>[[\n]]")


def test_a_system_column_is_the_first_turn(make):
    expected = shown(make([[SYSTEM, *HI]]))
    assert shown(make([{"system": "be kind", "messages": HI}])) == expected
    assert (
        shown(make([{"system": "be kind", "messages": [SYSTEM, *HI]}, {"system": "", "messages": HI}]))[0]
        == expected[0]
    )
    fails(
        make([{"system": "be rude", "messages": [SYSTEM, *HI]}]), "has a system turn and another text in its system col"
    )


def test_prompt_and_completion_are_one_conversation(make):
    assert shown(make([{"prompt": TWO[:3], "completion": TWO[3:]}])) == [LEARNED_LAST]
    fails(make([{"prompt": TWO[:3]}]), r"^Chat\.messages is null, and train has the columns prompt; name")


def test_what_would_be_learned_and_is_not_written_is_an_error(make):
    thinking = [HI[0], {**HI[1], "reasoning_content": "well"}]
    fails(make([HI, thinking]), r"^train\.jsonl, line 2: Chat\.messages has reasoning_content, which the chat template")
    template = UNMARKED.replace(
        "message.content + '<|im_end|>'", "(message.reasoning_content or '') + message.content + '<|im_end|>'", 1
    )
    assert "]]wellhello<|im_end|>[[" in shown(make([thinking], chat_template=template))[0]
    for name in ("images", "documents"):
        fails(
            make([{"messages": HI, name: [1]}]),
            rf'^train\.jsonl, line 1: .* the column "{name}", which Chat does not read',
        )


def test_further_variables_of_the_template(make, write):
    """Of the settings, and of a row, whose own ones win."""
    template = "{{ tone }}|" + UNMARKED
    settings = {"chat_template": template, "chat_template_kwargs": {"tone": "dry"}}
    rows = [{"messages": HI}, {"messages": HI, "chat_template_kwargs": {"tone": "warm"}}]
    assert [text.partition("|")[0] for text in shown(make(rows, **settings))] == ["[[dry", "[[warm"]
    asked = make(rows, predict=write("ask.jsonl", "\n".join(map(json.dumps, rows))), **settings)
    assert [text.partition("|")[0] for text in shown(asked, "predict")] == ["[[dry", "[[warm"]
    wrong = r"Chat\.chat_template_kwargs\.tune is 'dry'; the chat template does not read it: it reads tone\. Did you"
    fails(make([HI], chat_template=template, chat_template_kwargs={"tune": "dry"}), wrong)
    wrong = r"Chat\.chat_template_kwargs\.tools is \[\]; the data and the tokenizer give it to the template"
    fails(make([HI], chat_template=template, chat_template_kwargs={"tools": []}), wrong)
    wrong = r"line 1: Chat\.messages: chat_template_kwargs\.x is 1; the chat template does not read it: it reads none"
    fails(make([{"messages": HI, "chat_template_kwargs": {"x": 1}}]), wrong)
    wrong = r"line 1: Chat\.messages: chat_template_kwargs is \[1\]; it must be an object"
    fails(make([{"messages": HI, "chat_template_kwargs": [1]}]), wrong)


def test_other_fields_are_named_once_with_their_count(make, caplog):
    rows = [{"id": n, "messages": [{**HI[0], "name": "Ann"}, {**HI[1], "mood": "calm"}]} for n in range(3)]
    shown(make(rows))
    assert caplog.text.count("does not write mood (3 turns), name (3 turns)") == 1
    assert caplog.text.count("columns of 3 train rows that it does not know are not used: id") == 1


def test_every_fault_of_a_row_can_be_left_out(make, caplog):
    """Unknown roles, empty lists, content that is an object, no JSON: counted by kind, with lines of the file."""
    rows = [HI, [{"role": "robot", "content": "x"}], TWO, [], [HI[0], {"role": "assistant", "content": {"a": 1}}]]
    data = make([*rows, {"messages": "hi"}, {"messages": None}], on_error="skip")
    data.setup("fit")
    assert len(data.examples("train")) == 2
    found = {kind: len(places) for kind, places in data.sources.faults.found["train"].items()}
    assert found == {"with an unknown role": 1, "without turns": 3, "with content that is no text": 1}
    assert "(first: train.jsonl, line 2)" in data.sources.faults.told("train")
    assert data.facts()["train"]["skipped"] == 5
