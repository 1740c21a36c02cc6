"""Questions with images and sounds: `generate` and `chat` answer as transformers does with the same processor."""

from __future__ import annotations

import io
import json
import shutil
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from media_models import FAMILIES, PICTURED, RATE, picture, sound

import lora_lightning as ll
from ll_lora import LoRA
from lora_lightning.cli.answers.asking import inputs_of, prompt_of
from lora_lightning.cli.answers.prompts import Prompter
from lora_lightning.cli.answers.sampling import Sampling
from lora_lightning.cli.answers.terminal import Chat
from lora_lightning.cli.answers.voices import Voices
from lora_lightning.cli.main import main
from lora_lightning.data.media.parts import Media
from lora_lightning.data.media.prompts import Prompt
from lora_lightning.data.sources.faults import RowError

NEW = 6
"""Tokens of an answer."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the folder of a family's base model and that of an adapter with a random update."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            FAMILIES[family].save(folder / "base")
            model = auto(family).from_pretrained(folder / "base")
            ll.inject(model, LoRA(rank=2), seed=0)
            torch.manual_seed(0)
            with torch.no_grad():
                for _, layer in ll.iter_adapters(model):
                    layer.adapter("default").lora_B.normal_()
            known[family] = folder / "base", ll.save_adapter(model, folder / "adapter")
        return known[family]

    return make


def auto(family: str) -> Any:
    return (
        transformers.AutoModelForMultimodalLM if family == "qwen2-audio" else transformers.AutoModelForImageTextToText
    )


def answers(family: str, base: Path, adapter: Path | None, questions: list[list[Any]]) -> list[str]:
    """Greedy answers of transformers to one question after another, given as parts: texts, pictures, samples."""
    model, processor = auto(family).from_pretrained(base).eval(), FAMILIES[family].processor()
    if adapter is not None:
        ll.load_adapter(model, adapter)
    end = processor.tokenizer.convert_tokens_to_ids(FAMILIES[family].end)
    found = []
    for parts in questions:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": FAMILIES[family].kind}
            for part in parts
        ]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        media = [part for part in parts if not isinstance(part, str)]
        given: dict[str, Any] = {}
        if media:
            given = {"images": [media]} if FAMILIES[family].kind == "image" else {"audio": media, "sampling_rate": RATE}
        inputs = processor(text=[text], **given, add_special_tokens=False, return_tensors="pt")
        ids = model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=0, do_sample=False, pad_token_id=0, eos_token_id=[2, end]
        )[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return found


def write_sound(path: Path, samples: Any) -> Any:
    """A WAV file, and the samples that it holds."""
    numbers = (samples * 2**15).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(numbers.tobytes())
    return numbers.astype("float32") / 2**15


@pytest.mark.parametrize("family", PICTURED)
def test_a_file_of_questions_about_images_is_answered_as_by_transformers(
    made: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = made(family)
    data = tmp_path / "data"
    data.mkdir()
    pictures = [picture(number, 20 + 4 * number, 16) for number in range(3)]
    for number, one in enumerate(pictures):
        one.save(data / f"{number}.png")
    turns = [{"role": "user", "content": "a<image>b"}, {"role": "assistant", "content": "not asked"}]
    parts = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "what?"}]
    rows = [
        {"messages": turns, "image": "0.png"},
        {"messages": [{"role": "user", "content": parts}]},
        {"messages": [{"role": "user", "content": "<image>or<image>"}], "images": ["2.png", "0.png"]},
        {"messages": [{"role": "user", "content": "no image"}]},
    ]
    (data / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "texts.jsonl").write_text(json.dumps({"question": "what?", "image": "1.png"}))
    monkeypatch.chdir(tmp_path)
    flags = ["--max_new_tokens", str(NEW), "--device", "cpu"]
    expected = answers(
        family,
        base,
        adapter,
        [["a", pictures[0], "b"], [pictures[1], "what?"], [pictures[2], "or", pictures[0]], ["no image"]],
    )
    for size in ("8", "1"):
        words = ["--input", "data/in.jsonl", "--output", "out.jsonl", "--batch_size", size]
        assert main(["generate", str(adapter), *words, *flags]) == 0
        out = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert [row["prediction"] for row in out] == expected
    assert out[2]["images"] == ["2.png", "0.png"]
    assert main(["generate", str(base), "--input", "data/texts.jsonl", "--output", "out.csv", *flags]) == 0
    assert answers(family, base, None, [[pictures[1], "what?"]])[0] in Path("out.csv").read_text()
    assert expected[1] != answers(family, base, None, [[pictures[1], "what?"]])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_gets_what_the_processor_makes_of_two_questions(made: Any, family: str, tmp_path: Path) -> None:
    base, _ = made(family)
    one, processor = FAMILIES[family], FAMILIES[family].processor()
    voices = Voices([str(base)], device="cpu")
    if one.kind == "image":
        picture(0).save(tmp_path / "0.png")
        value: Any = picture(0)
    else:
        value = write_sound(tmp_path / "0.wav", sound(0, 12000))
    media = {"type": one.kind, one.kind: Media(one.kind, str(tmp_path / ("0.png" if one.kind == "image" else "0.wav")))}
    asked = [
        [{"role": "user", "content": [media, {"type": "text", "text": "what is it?"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "it?"}, media]}],
    ]
    prompts = [prompt_of(voices.current, turns, "a row") for turns in asked]
    found = inputs_of(voices.current, prompts, voices.model)
    texts = [processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in asked]
    given = {"images": [[value], [value]]} if one.kind == "image" else {"audio": [value, value], "sampling_rate": RATE}
    expected = processor(
        text=texts, **given, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    lengths = [len(prompt.ids) for prompt in prompts]
    assert lengths == expected["attention_mask"].sum(1).tolist()


def test_sounds_are_asked_about_in_a_file(made: Any, tmp_path: Path) -> None:
    base, adapter = made("qwen2-audio")
    samples = [write_sound(tmp_path / f"{number}.wav", sound(number, 9000 + 3000 * number)) for number in range(2)]
    rows = [{"prompt": f"<audio>{word}", "audio": f"{number}.wav"} for number, word in enumerate(("who?", "when?"))]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    assert main(["generate", str(adapter), *words, "--max_new_tokens", str(NEW)]) == 0
    out = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert out == answers("qwen2-audio", base, adapter, [[samples[0], "who?"], [samples[1], "when?"]])


def test_an_image_column_of_datasets_is_asked_about_and_named_in_the_output(made: Any, tmp_path: Path) -> None:
    base, _ = made("smolvlm")
    picture(0).save(tmp_path / "0.png")
    image = {"bytes": (tmp_path / "0.png").read_bytes(), "path": "kept.png"}
    features = Features({"image": ImageFeature(), "question": Value("string")})
    Dataset.from_list([{"image": image, "question": "what?"}], features=features).to_parquet(tmp_path / "in.parquet")
    words = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    assert main(["generate", str(base), *words, "--max_new_tokens", str(NEW)]) == 0
    expected = answers("smolvlm", base, None, [[picture(0), "what?"]])[0]
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "image": "kept.png",
        "question": "what?",
        "index": 0,
        "prediction": expected,
    }


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"prompt": "what?", "image": "none.png"}, [], 'row 0: an image "none.png": no such file in '),
        ({"prompt": "<image>or<image>", "image": "0.png"}, [], "row 0: the turns have 2 <image> marks"),
        ({"prompt": "what?", "audio": "0.wav"}, [], "it has 1 of kind audio, which Qwen2_5_VLProcessor does not read"),
        ({"prompt": "what?", "image": "in.jsonl"}, [], 'an image "in.jsonl": it is no image that Pillow knows'),
        ({"prompt": "what?", "image": "0.png"}, ["--plain"], 'has a value in the column "image", and base reads texts'),
    ],
)
def test_rows_with_images_that_cannot_be_used(
    made: Any, row: Any, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = made("qwen2.5-vl")
    picture(0).save(tmp_path / "0.png")
    write_sound(tmp_path / "0.wav", sound(0))
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    words = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"), *flags]
    assert main(["generate", str(base), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def talked(folder: Path, *lines: str) -> tuple[list[str], str, Chat]:
    """Answers and notes of a chat."""
    out, notes = io.StringIO(), io.StringIO()
    chat = Chat(Voices([str(folder)], device="cpu"), Sampling(greedy=True, max_new_tokens=NEW), out, notes)
    chat.run(iter(lines))
    return out.getvalue().split("\n")[:-1], notes.getvalue(), chat


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_attached_belongs_to_the_next_question(made: Any, family: str, tmp_path: Path) -> None:
    base, adapter = made(family)
    kind = FAMILIES[family].kind
    path = tmp_path / "a b.file"
    if kind == "image":
        picture(0).save(path, format="PNG")
        value: Any = picture(0)
    else:
        value = write_sound(path, sound(0, 12000))
    found, notes, chat = talked(adapter, f"/{kind} '{path}'", "what?", "/reset", "what?")
    expected = answers(family, base, adapter, [[value, "what?"], ["what?"]])
    shown = "\n".join(found)
    assert shown == "\n".join(expected)
    assert f"[{kind} 1 of the next question]" in notes
    assert [turn["role"] for turn in chat.conversation.turns][:1] in ([], ["user"])


def test_an_attached_image_stays_in_the_conversation(made: Any, tmp_path: Path) -> None:
    base, _ = made("qwen2.5-vl")
    picture(0).save(tmp_path / "0.png")
    _, _, chat = talked(base, f"/image {tmp_path / '0.png'}", "what?")
    conversation, voice = chat.conversation, chat.voices.current
    assert conversation.attached == {}
    found = conversation.prompt(voice, "and?", None)
    assert [one.value.size for one in found.media] == [(20, 16)]
    shorter = conversation.prompt(voice, "and?", len(found.ids) - 1)  # with the first exchange its image goes
    assert shorter.media == ()
    assert isinstance(shorter, Prompt)


def test_attachments_that_are_refused_or_taken_back(made: Any, tmp_path: Path) -> None:
    base, _ = made("qwen2.5-vl")
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "no.png").write_text("text")
    image = f"/image {tmp_path / '0.png'}"
    lines = [f"/image {tmp_path}/none.png", f"/image {tmp_path}/no.png", "/image https://example.org/a.png"]
    _, notes, chat = talked(base, *lines, image, image, "<image>or<image>or<image>", "/image")
    assert 'none.png": no such file in' in notes
    assert 'no.png": it is no image that Pillow knows' in notes
    assert "nothing is loaded from the net" in notes
    assert "[image 2 of the next question]" in notes
    assert "[error: the question: the turns have 3 <image> marks" in notes
    assert "[nothing is attached]" in notes
    assert chat.conversation.attached == {}


TEXTS_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def run_of_texts(made: Any, tmp_path: Path) -> Path:
    """A run of Chat on a model of images, with a template of texts."""
    base, adapter = made("qwen2.5-vl")
    shutil.copytree(adapter, tmp_path / "run/adapter")
    data = {"class_path": "Chat", "init_args": {"tokenizer": str(base), "chat_template": TEXTS_ALONE}}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({"data": data}))
    return tmp_path / "run"


def test_an_adapter_of_texts_on_a_model_of_images_begins_anew_behind_an_image(
    run_of_texts: Path, tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "0.png")
    image = f"/image {tmp_path / '0.png'}"
    _, notes, chat = talked(run_of_texts, "/base", image, "what?", "/adapter 1", "and?", image)
    assert "run has a part of type image" not in notes
    assert "the conversation has a part of type image, and run reads texts alone: its chat template writes no" in notes
    assert "the conversation begins anew]" in notes
    assert "0.png is of kind image, and run reads texts alone: its chat template writes no content in parts.]" in notes
    assert all(isinstance(turn["content"], str) for turn in chat.conversation.turns)
    _, notes, _ = talked(run_of_texts, "/base", image, "/adapter 1", "what?")
    assert "[error: the question has a part of type image, and run reads texts alone" in notes


def test_a_row_with_a_part_of_an_image_for_an_adapter_of_texts(run_of_texts: Path) -> None:
    voice = Voices([str(run_of_texts)], device="cpu").current
    turns = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(RowError, match="row 0, turn 0 has a part of type image, and run reads texts alone: its chat"):
        Prompter(voice, None, "").prompt({"messages": turns}, "row 0", None)
    asked = Prompter(voice, None, "").prompt({"prompt": "what is <image>?"}, "row 0", None)
    assert "what is <image>?" in voice.tokenizer.decode(asked.ids)
