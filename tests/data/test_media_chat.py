"""MediaChat: what is learned, what a batch holds, and what is refused, for each family against its own processor."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path

import datasets
import pytest
import torch
from media_models import FAMILIES, PICTURED, QWEN_TEMPLATE, RATE, picture, sound

from lora_lightning.cli.classes import parameters_of
from lora_lightning.cli.main import main
from lora_lightning.data import Chat, MediaChat
from lora_lightning.data.inspect import show_examples
from lora_lightning.data.media_chat import FIXED
from lora_lightning.data.tokens.marks import mark
from lora_lightning.errors import DataError, SettingsError
from lora_lightning.models.tasks import find_task

SIZES = [(20, 16), (40, 24), (16, 40)]
MARKED = QWEN_TEMPLATE.replace(
    "{% if m.content is string %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{% if m.content is string %}",
).replace("{% endfor %}{% endif %}<|im_end|>\n", "{% endfor %}{% endif %}<|im_end|>\n{% endif %}")


@pytest.fixture(scope="session")
def processors(tmp_path_factory):
    """A folder with the processor of each family."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in FAMILIES}
    for name, folder in folders.items():
        FAMILIES[name].processor().save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Three pictures of other sizes, and three sounds of other lengths."""
    folder = tmp_path_factory.mktemp("files")
    for number, (width, height) in enumerate(SIZES):
        picture(number, width, height).save(folder / f"{number}.png")
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes((sound(number, 5000 * (number + 1)) * 2**15).astype("<i2").tobytes())
    return folder


@pytest.mark.parametrize("name", FIXED)
def test_what_texts_alone_can_do_is_refused_with_its_reason(name, processors, capsys):
    with pytest.raises(SettingsError, match=f"^MediaChat has no {name}: {re.escape(FIXED[name])}$"):
        MediaChat(train="rows.jsonl", processor=processors["gemma3"], **{name: True})
    assert main(["fit", "--config", "tasks/image_chat", f"--data.{name}", "1"]) == 2
    assert capsys.readouterr().err == f"error: data: MediaChat has no {name}: {FIXED[name]}\n"
    assert name not in parameters_of(MediaChat)
    assert name in parameters_of(Chat)


def turn(role, content):
    return {"role": role, "content": content}


def rows(kind="image") -> list[dict]:
    end = {"image": "png", "audio": "wav"}[kind]
    one = [turn("user", f"<{kind}>what?"), turn("assistant", "a cat")]
    two = [
        turn("user", f"<{kind}> or <{kind}>?"),
        turn("assistant", "two"),
        turn("user", f"<{kind}>"),
        turn("assistant", "dog"),
    ]
    return [
        {"messages": one, kind: f"0.{end}"},
        {"messages": two, f"{kind}s": [f"1.{end}", f"2.{end}", f"0.{end}"]},
        {"messages": [turn("user", "hi"), turn("assistant", "ho")]},
    ]


@pytest.fixture
def make(files, processors):
    def make(given, family="qwen2.5-vl", **settings) -> MediaChat:
        path = files / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, given)))
        settings = {"processor": processors[family], "validation_fraction": 0.0, "batch_size": 3, **settings}
        return MediaChat(train=str(path), predict=str(path), **settings)

    return make


def ready(data: MediaChat, stage="fit") -> MediaChat:
    data.setup(stage)
    return data


def in_order(data: MediaChat, split="train") -> dict:
    """The examples of a split as one batch."""
    examples = data.examples(split)
    return data.collation(split, ("labels", "index"), None)(list(examples))


def conversation(row, folder, kind="image") -> list[dict]:
    """The turns as transformers takes them, with paths in their parts."""
    every = [row[kind]] if kind in row else row.get(f"{kind}s", [])
    left = iter(every)
    found = []
    for one in row["messages"]:
        pieces = one["content"].replace(f"<{kind}>", "\0\1\0").split("\0")
        parts = [
            {"type": kind, "path": str(folder / next(left))} if piece == "\1" else {"type": "text", "text": piece}
            for piece in pieces
            if piece
        ]
        found.append({"role": one["role"], "content": parts})
    return found


# -- each family -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_their_ends_are_learned_and_nothing_else(make, family):
    kind, end = FAMILIES[family].kind, FAMILIES[family].end
    data = ready(make(rows(kind), family))
    tokenizer = data.tokenizer_object
    for example, answers in zip(data.examples("train"), (["a cat"], ["two", "dog"], ["ho"]), strict=True):
        learned = [token for token in example["labels"] if token != -100]
        assert tokenizer.decode(learned).split(end) == [
            *(f" {one}" if family == "smolvlm" else one for one in answers),
            "",
        ]
        assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_images_are_never_learned_even_in_an_answer(make, family):
    kind = FAMILIES[family].kind
    end = {"image": "png", "audio": "wav"}[kind]
    talk = [turn("user", "draw"), turn("assistant", f"so: <{kind}> done")]
    data = ready(make([{"messages": talk, kind: f"1.{end}"}], family))
    example, tokenizer = data.examples("train")[0], data.tokenizer_object
    token = tokenizer.convert_tokens_to_ids(FAMILIES[family].image_token)
    assert token in example["input_ids"]
    assert token not in example["labels"]
    learned = tokenizer.decode([label for label in example["labels"] if label != -100])
    assert "so: " in learned
    assert " done" in learned
    batch = in_order(data)
    assert not (batch["labels"] == token).any()


@pytest.mark.parametrize("family", PICTURED)
def test_batches_are_what_transformers_makes_of_the_conversations(make, files, family):
    data = ready(make(rows(), family))
    batch = in_order(data)
    talks = [conversation(row, files) for row in rows()]
    theirs = data.processor_object.apply_chat_template(
        talks,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert set(batch) == {*theirs, "labels", "index"}
    for name, tensor in theirs.items():
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_unequal_images_has_the_loss_of_its_rows(make, family):
    """Where image tokens, sizes or masks were mixed up between rows, the sum would differ."""
    data = ready(make(rows(FAMILIES[family].kind), family))
    task, model = find_task("image-text-to-text"), FAMILIES[family].model()
    collate = data.collation("train", ("labels",), None)
    examples = list(data.examples("train"))
    together = task.loss_of(model, collate(examples))
    alone = [task.loss_of(model, collate([example])) for example in examples]
    assert int(together.count) == sum(int(one.count) for one in alone)
    assert float(together.total.detach()) == pytest.approx(sum(float(one.total.detach()) for one in alone), rel=1e-5)


def test_marks_of_the_template_are_those_of_transformers(make, files):
    data = ready(make(rows()[:2], chat_template=MARKED))
    talks = [conversation(row, files) for row in rows()[:2]]
    theirs = data.processor_object.apply_chat_template(
        talks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for example, ids, mask in zip(data.examples("train"), theirs["input_ids"], theirs["assistant_masks"], strict=True):
        assert example["input_ids"] == ids
        assert [int(label != -100) for label in example["labels"]] == mask


# -- sources -----------------------------------------------------------------------------------------------------------


def test_an_image_column_of_datasets_gives_the_same_batch(make, tmp_path, processors):
    ours = in_order(ready(make(rows()[:2])))
    talks = [row["messages"] for row in rows()[:2]]
    pictures = [[picture(0, *SIZES[0])], [picture(number, *SIZES[number]) for number in (1, 2, 0)]]
    table = datasets.Dataset.from_dict({"messages": talks, "images": pictures})
    table = table.cast_column("images", datasets.List(datasets.Image()))
    table.save_to_disk(tmp_path / "table")
    table.to_parquet(tmp_path / "table.parquet")
    for source in ("table", "table.parquet"):
        data = MediaChat(train=str(tmp_path / source), processor=processors["qwen2.5-vl"], validation_fraction=0.0)
        batch = in_order(ready(data))
        assert all(torch.equal(batch[name], ours[name]) for name in ours)


def test_parts_with_values_give_the_same_batch_as_marks_with_a_column(make):
    marks = in_order(ready(make(rows()[:1])))
    parts = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "what?"}]
    batch = in_order(ready(make([{"messages": [turn("user", parts), turn("assistant", "a cat")]}])))
    assert all(torch.equal(batch[name], marks[name]) for name in marks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "none.png"}, r'^train\.jsonl, line 2: an image "none\.png": no such file in '),
        ({"image": "train.jsonl"}, r'^train\.jsonl, line 2: an image "train\.jsonl": it is no image that Pillow knows'),
        ({"image": None}, r"^train\.jsonl, line 2: MediaChat\.messages: the turns have 1 <image> marks .* hold 0"),
        ({"images": ["0.png"]}, r"line 2: MediaChat\.messages: the turns have 1 <image> marks .* hold 2"),
        ({"audio": "0.wav"}, r"line 2: MediaChat\.messages: the turns have 0 <audio> marks .* hold 1"),
        (
            {"video": "a.mp4"},
            'line 2: MediaChat.messages has a value in the column "video", which MediaChat does not read',
        ),
        (
            {"messages": [turn("user", "<image> <|image_pad|>"), turn("assistant", "a")]},
            r'line 2: the rendered text has "<\|image_pad\|>" 2 times, and there are 1 of kind image',
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_told_with_file_and_line_or_counted(make, change, message):
    given = [rows()[0], {**rows()[0], **change}]
    with pytest.raises(DataError, match=message):
        ready(make(given))
    data = ready(make(given, on_error="skip"))
    assert data.facts()["train"] == {"examples": 1, "truncated": 0, "dropped": 0, "skipped": 1}


def test_sounds_are_refused_by_a_processor_of_images(make):
    given = [{"messages": [turn("user", "<audio>"), turn("assistant", "a")], "audio": "0.wav"}]
    with pytest.raises(DataError, match=r"line 1: it has 1 of kind audio, which Qwen2_5_VLProcessor does not read"):
        ready(make(given))


# -- what is too long --------------------------------------------------------------------------------------------------


def test_a_long_conversation_loses_its_first_exchanges_with_their_images(make):
    data = ready(make(rows()[:2], max_length=40))
    short = data.examples("train")[1]
    assert data.facts()["train"] == {"examples": 2, "truncated": 1, "dropped": 0, "skipped": 0}
    assert mark(short["input_ids"], short["labels"], data.tokenizer_object) == (
        "[[<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n]]dog<|im_end|>[[\n]]"
    )
    [media] = data.media_of("train", short)
    assert media.value == "0.png"
    alone = in_order(ready(make([{"messages": rows()[1]["messages"][2:], "image": "0.png"}])))
    batch = data.collation("train", ("labels",), None)([short])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])


def test_one_exchange_that_is_too_long_is_dropped_and_counted_not_cut(make, caplog):
    data = ready(make([rows()[0], rows()[2]], max_length=30))
    assert data.facts()["train"] == {"examples": 1, "truncated": 0, "dropped": 1, "skipped": 0}
    assert "MediaChat: left 1 of 2 train rows out: 1 that max_length leaves nothing to learn in" in caplog.text
    with pytest.raises(DataError, match=r"^MediaChat\.train: nothing is left of 1 conversations"):
        ready(make([rows()[0]], max_length=30))


def test_a_prompt_that_is_too_long_to_be_answered_is_told(make):
    with pytest.raises(
        DataError, match=r"line 1: MediaChat\.messages: the prompt has 27 tokens, more than data\.max_length"
    ):
        ready(make(rows()[:1], max_length=20), "predict")


# -- to predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PICTURED)
def test_prompts_are_the_batch_without_answers_padded_on_the_left(make, files, family):
    data = ready(make(rows(), family), "predict")
    batch = next(iter(data.predict_dataloader()))
    talks = [conversation(row, files)[:-1] for row in rows()]
    theirs = data.processor_object.apply_chat_template(
        talks,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert batch["index"].tolist() == [0, 1, 2]
    assert set(batch["prompts"]) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(batch["prompts"][name], tensor), name


def test_a_question_without_an_answer_is_a_prompt(make):
    given = [{"messages": rows()[0]["messages"][:1], "image": "0.png"}]
    data = ready(make(given), "predict")
    batch = next(iter(data.predict_dataloader()))
    assert torch.equal(batch["prompts"]["input_ids"], batch["input_ids"])
    assert (batch["labels"] == -100).all()


# -- told and resumed --------------------------------------------------------------------------------------------------


def test_inspection_shows_the_mask_and_the_images(make):
    shown = show_examples(ready(make(rows())), 2)
    assert "<|image_pad|> x 4<|vision_end|> or " in shown
    assert "]]two<|im_end|>[[" in shown
    assert "image 1.png: 40 x 24\nimage 2.png: 16 x 40\nimage 0.png: 20 x 16" in shown


def test_a_resumed_run_must_have_the_same_images_and_the_same_processor_sizes(make, tmp_path, files, processors):
    def identity(**settings):
        return ready(make(rows()[:2], **settings)).training_identity()

    before = identity()
    assert identity() == before
    kept = (files / "0.png").read_bytes()
    picture(9, *SIZES[0]).save(files / "0.png")
    changed = identity()
    (files / "0.png").write_bytes(kept)
    assert {name for name in before if before[name] != changed[name]} == {"images and sounds"}
    larger = FAMILIES["qwen2.5-vl"].processor()
    larger.image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    larger.save_pretrained(tmp_path)
    other = identity(processor=str(tmp_path))
    assert {name for name in before if before[name] != other[name]} == {"prepared examples"}


def test_a_file_of_another_size_while_training_is_an_error(make, files):
    data = ready(make(rows()[:1]))
    kept = (files / "0.png").read_bytes()
    picture(1, *SIZES[1]).save(files / "0.png")
    with pytest.raises(DataError, match=r"MediaChat\.train, train\.jsonl, line 1: its tokens are others than when"):
        in_order(data)
    (files / "0.png").unlink()
    with pytest.raises(DataError, match=r'MediaChat\.train, train\.jsonl, line 1: an image "0\.png": no such file'):
        in_order(data)
    (files / "0.png").write_bytes(kept)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }}{% endfor %}", "{% for m in messages %}{% endfor %}"]
)
def test_a_template_of_texts_alone_is_refused(make, template):
    with pytest.raises(DataError, match=r"MediaChat\.chat_template: the template .* does not write content in parts"):
        ready(make(rows(), chat_template=template))
