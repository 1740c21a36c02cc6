from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from adapter_files import METHOD, TOKENS, adapted, refused, rewrite
from file_steps import each_step
from safetensors.torch import load_file, save_file

import lora_lightning as ll
from lora_lightning.errors import AdapterFileError, LoraLightningError
from lora_lightning.models.new_tokens import Vocabulary, add_rows
from lora_lightning.storage.stored import CARD, DESCRIPTION, FILE, LAYOUT, TOKENIZER, Stored, belonging, read_folder
from lora_lightning.testing import TinyMLP, perturb, tiny_decoder

T = TypeVar("T")
ADDED = ("<a>", "<b>")


def taught(seed: int = 0, **files: str) -> Any:
    """A model with two new tokens; of another seed, another adapter of it."""
    model = tiny_decoder()
    content = {name.replace("_", ".", 1): text.encode() for name, text in files.items()}
    add_rows(model, Vocabulary(ADDED, 32, content))
    adapted(model, targets=["q_proj"])
    for _, layer in ll.iter_adapters(model):
        perturb(layer.adapters, seed)
    return model


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """An adapter with new tokens and the three files of their tokenizer."""
    model = taught(tokenizer_json='{"one": 1}', merges_txt="a b\n", vocab_json="{}")
    return ll.save_adapter(model, tmp_path / "tokens")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another save of the same kind, for a mixture."""
    model = taught(seed=7, tokenizer_json='{"two": 2}', vocab_json="{}")
    return ll.save_adapter(model, tmp_path / "other")


def as_0_1(folder: Path) -> Path:
    """The folder without digests, as version 0.1 wrote it."""
    tensors, description = load_file(folder / FILE), json.loads((folder / DESCRIPTION).read_text())
    description["schema_version"] = 1
    for part in ("dtypes", "content"):
        del description["fingerprint"][part]
    save_file(tensors, folder / FILE, {"format": "lora_lightning", "adapter": json.dumps(description)})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def same(one: Stored, other: Stored) -> bool:
    """Whether two folders state the same, files of the tokenizer included."""
    values = all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
    files = [stored.vocabulary.files if stored.vocabulary else None for stored in (one, other)]
    return values and one.description == other.description and files[0] == files[1] and one.name == other.name


# -- damage ------------------------------------------------------------------------------------------------------------


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One thing that disks, transfers and editors do to a file."""
    size, at = len(content), draw.randrange(len(content))
    end = min(size, at + draw.choice([1, 8, 64, 512, 4096]))
    kind = draw.randrange(8)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + bytes(end - at) + content[end:]  # a page of zeros
    if kind == 2:
        return content[:at] + bytes(size - at)  # cut off, and padded to its size
    if kind == 3:
        return content[:at]
    if kind == 4:
        return content[:at] + content[end:]
    if kind == 5:
        return content[:at] + draw.randbytes(end - at) + content[end:]
    if kind == 6:
        return content + draw.randbytes(draw.choice([1, 8, 100]))
    half = (end - at) // 2
    return content[:at] + content[at + half : at + 2 * half] + content[at : at + half] + content[at + 2 * half :]


def outcome(call: Callable[[], T]) -> tuple[T | None, str]:
    """The answer, or None and the message of an error, which is one of ours and one line."""
    try:
        return call(), ""
    except LoraLightningError as error:
        said = str(error)
    assert "\n" not in said
    return None, said


@pytest.mark.parametrize("file", [FILE, DESCRIPTION, f"{TOKENIZER}/tokenizer.json", f"{TOKENIZER}/merges.txt"])
def test_a_damaged_folder_is_refused_in_one_line_or_states_the_same(file: str, tokens: Path) -> None:
    whole, content = read_folder(tokens), (tokens / file).read_bytes()
    draw, refusals = random.Random(0), 0
    for _ in range(250):
        (tokens / file).write_bytes(damaged(content, draw))
        found, said = outcome(lambda: read_folder(tokens))
        if found is None:
            refusals += 1
            assert str(tokens) in said
        else:
            assert same(found, whole), "spaces that mean nothing may change"
    assert refusals > 200 or len(content) < 20


@pytest.mark.parametrize("old", [False, True])
def test_no_damage_ends_in_an_error_that_is_not_ours(old: bool, folder: Path) -> None:
    """Without digests damaged numbers cannot be noticed; all else is noticed, or fits the model after all."""
    if old:
        as_0_1(folder)
    content = {name: (folder / name).read_bytes() for name in (FILE, DESCRIPTION)}
    reference, draw = read_folder(folder), random.Random(1)
    for number in range(300):
        name = DESCRIPTION if number % 6 == 0 else FILE
        (folder / name).write_bytes(damaged(content[name], draw))
        loaded, _ = outcome(lambda: ll.load_adapter(TinyMLP(), folder))
        if loaded is not None:
            assert old or same(read_folder(folder), reference)
        (folder / name).write_bytes(content[name])


@pytest.mark.parametrize("value", [None, 0, -1, 1e400, True, "x", "", [], ["x"], {}, {"x": 1}, [[1]], {"first": []}])
def test_a_description_of_0_1_with_a_value_of_another_kind(folder: Path, value: Any) -> None:
    as_0_1(folder)
    whole = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).unlink()
    tensors = load_file(folder / FILE)
    for key in whole:
        for text in ({**whole, key: value}, *_one_changed(whole, key, value)):
            metadata = {"format": "lora_lightning", "adapter": json.dumps(text)}
            save_file(tensors, folder / FILE, metadata)
            outcome(lambda: ll.load_adapter(TinyMLP(), folder))


def _one_changed(whole: dict[str, Any], key: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(whole[key], dict):
        return []
    return [{**whole, key: {**whole[key], inner: value}} for inner in whole[key]]


def test_the_tensor_is_named(folder: Path) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[-1] ^= 1
    (folder / FILE).write_bytes(content)
    refused(TinyMLP(), folder, r"truncated or damaged: tensor second\.adapters\.default\.\w+ is not what was saved")


def test_two_tensors_of_equal_shape_that_were_exchanged_are_named(tokens: Path) -> None:
    """The offsets in the header are exchanged, as a tool that sorts tensors might."""
    content = (tokens / FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    one, two = (f"model.layers.{i}.self_attn.q_proj.adapters.default.lora_A" for i in range(2))
    offsets = [header[key]["data_offsets"] for key in (one, two)]
    header[one]["data_offsets"], header[two]["data_offsets"] = reversed(offsets)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    (tokens / FILE).write_bytes(content[:8] + text + content[8 + size :])
    assert load_file(tokens / FILE).keys() == header.keys() - {"__metadata__"}
    with pytest.raises(AdapterFileError, match=f"tensor {one} is not what was saved"):
        read_folder(tokens)


def test_an_edited_setting_is_refused_wherever_it_was_edited(folder: Path) -> None:
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text.replace('"alpha": 4.0', '"alpha": 8.0'))
    said = rf'adapter.json" differs from {FILE} in settings.alpha: 8.0 in place of 4.0. .* delete it, or save'
    refused(TinyMLP(), folder, said)
    (folder / DESCRIPTION).unlink()
    ll.load_adapter(TinyMLP(), folder)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content.replace(b'\\"alpha\\": 4.0', b'\\"alpha\\": 8.0'))
    assert (folder / FILE).read_bytes() != content
    refused(TinyMLP(), folder, "damaged: the description in it is not what was saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["settings"].update(rank=3), "settings.rank: 3 in place of 2"),
        (lambda d: d["settings"].pop("rank"), "settings.rank, which it lacks"),
        (lambda d: d.update(mine=1), "mine, which adapter.safetensors lacks"),
        (lambda d: d["layers"].pop("first"), "layers.first, which it lacks"),
        (lambda d: d.update(seed=False), "seed: False in place of 0"),
        (lambda d: d["fingerprint"].update(names="0"), "fingerprint.names: '0' in place of"),
        (lambda d: d.update(trained=["first.weight"]), r"trained: \['first.weight'\] in place of \[\]"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_field_of_adapter_json_that_differs_is_named(
    old: bool, change: Callable[[dict[str, Any]], Any], message: str, folder: Path
) -> None:
    if old:
        as_0_1(folder)
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))
    refused(TinyMLP(), folder, f"differs from {FILE} in {message}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udcff"])
def test_an_adapter_json_that_is_none(folder: Path, text: str) -> None:
    (folder / DESCRIPTION).write_text(text, errors="surrogateescape")
    refused(TinyMLP(), folder, r'adapter.json" (is damaged|differs from .* in all of it)')


# -- mixtures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (FILE, r'adapter.json" differs from adapter.safetensors in|tokenizer/\w+\.\w+" is'),
        (DESCRIPTION, None),
        (f"{TOKENIZER}/tokenizer.json", r'tokenizer/tokenizer.json" is not what was saved with adapter.safetensors'),
        (TOKENIZER, r'tokenizer/merges.txt" is missing'),
    ],
)
def test_a_part_of_another_save_is_named(name: str, message: str | None, tokens: Path, other: Path) -> None:
    whole = read_folder(tokens)
    if (tokens / name).is_dir():
        shutil.rmtree(tokens / name)
        shutil.copytree(other / name, tokens / name)
    else:
        shutil.copy(other / name, tokens / name)
    if message is None:  # both saves have one description
        assert same(read_folder(tokens), whole)
        return
    with pytest.raises(AdapterFileError, match=message):
        read_folder(tokens)


def test_a_file_that_no_save_wrote_is_named_and_hidden_ones_are_nobodys(tokens: Path) -> None:
    (tokens / TOKENIZER / ".DS_Store").write_text("x")
    assert read_folder(tokens).vocabulary.files.keys() == {"tokenizer.json", "merges.txt", "vocab.json"}
    (tokens / TOKENIZER / "added_tokens.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r'tokenizer/added_tokens.json" is no file of this adapter'):
        read_folder(tokens)


def test_an_adapter_without_new_tokens_does_not_look_at_a_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).mkdir()
    (folder / TOKENIZER / "tokenizer.json").write_text("mine")
    ll.load_adapter(TinyMLP(), folder)
    ll.save_adapter(adapted(), folder)
    assert (folder / TOKENIZER / "tokenizer.json").read_text() == "mine"


def test_a_file_that_belongs_to_no_save_is_in_the_way_of_one_with_new_tokens(tokens: Path) -> None:
    (tokens / TOKENIZER / "mine.txt").write_text("mine")
    ll.save_adapter(taught(seed=3, tokenizer_json="{}"), tokens)
    with pytest.raises(AdapterFileError, match=r'mine.txt" is no file of this adapter'):
        read_folder(tokens)


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{TOKENIZER}/merges.txt", FILE, DESCRIPTION])
@pytest.mark.parametrize("old", [False, True])
def test_a_link_to_a_private_file_is_not_followed(old: bool, name: str, tokens: Path, tmp_path: Path) -> None:
    """What is read of a stranger's folder is written again by `save_adapter` and `export`."""
    if old:
        as_0_1(tokens)
    (tmp_path / "private").write_text("secret")
    (tokens / name).unlink()
    (tokens / name).symlink_to(tmp_path / "private")
    with pytest.raises(AdapterFileError, match=f'{name}" is a link out of its folder, to ".*/private"'):
        ll.load_adapter(tiny_decoder(), tokens)


def test_a_tokenizer_folder_that_is_a_link_is_not_followed(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("secret")
    shutil.rmtree(tokens / TOKENIZER)
    (tokens / TOKENIZER).symlink_to(tmp_path / "home")
    with pytest.raises(AdapterFileError, match='tokenizer" is a link out of its folder'):
        ll.load_adapter(tiny_decoder(), as_0_1(tokens))


def test_an_adapter_in_the_hugging_face_cache_is_links_to_blobs(tokens: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--it"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / TOKENIZER).mkdir(parents=True)
    for number, path in enumerate(path for path in tokens.rglob("*") if path.is_file()):
        shutil.copy(path, repository / "blobs" / str(number))
        link = snapshot / path.relative_to(tokens)
        link.symlink_to(Path(*[".."] * len(link.relative_to(repository).parts[:-1])) / "blobs" / str(number))
    assert same(read_folder(snapshot), read_folder(tokens))


# -- saving over -------------------------------------------------------------------------------------------------------


def test_the_same_adapter_gives_the_same_bytes(tokens: Path, tmp_path: Path) -> None:
    model = taught(tokenizer_json='{"one": 1}', merges_txt="a b\n", vocab_json="{}")
    for number in range(5):
        again = ll.save_adapter(model, tmp_path / f"again {number}")
        for path in tokens.rglob("*"):
            if path.is_file():
                assert (again / path.relative_to(tokens)).read_bytes() == path.read_bytes(), path.name


def test_one_adapter_over_another_leaves_nothing_of_it(tokens: Path) -> None:
    assert sorted(belonging(tokens)) == [
        DESCRIPTION,
        *(f"{TOKENIZER}/{n}" for n in ("merges.txt", "tokenizer.json", "vocab.json")),
    ]
    ll.save_adapter(taught(seed=1, tokenizer_json="{}"), tokens)
    assert [path.name for path in (tokens / TOKENIZER).iterdir()] == ["tokenizer.json"]
    ll.save_adapter(adapted(tiny_decoder(), targets=["q_proj"]), tokens)
    assert sorted(path.name for path in tokens.iterdir()) == [CARD, DESCRIPTION, FILE]
    assert belonging(tokens.parent) == []
    assert all(LAYOUT.has(name) for name in belonging(tokens))


def test_an_adapter_of_0_1_is_replaced_with_its_tokenizer(tokens: Path) -> None:
    ll.save_adapter(taught(seed=1, tokenizer_json="{}"), as_0_1(tokens))
    assert [path.name for path in (tokens / TOKENIZER).iterdir()] == ["tokenizer.json"]


def test_a_kill_at_any_step_of_a_save_leaves_one_adapter_whole(tokens: Path, other: Path, tmp_path: Path) -> None:
    """Never the tokenizer of one with the rows of the other, whichever step was the last."""
    old, new = read_folder(tokens), read_folder(other)
    model = taught(seed=7, tokenizer_json='{"two": 2}', vocab_json="{}")
    folder, found = tmp_path / "folder", []

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tokens, folder)

    for number, step in each_step(lambda: ll.save_adapter(model, folder), prepare):
        there = read_folder(folder)
        assert same(there, old) or same(there, new), f"step {number}: {step}"
        found.append(same(there, new))
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert found == sorted(found), "from one step on it is the new one"
    assert {*found} == {False, True}
    assert same(read_folder(folder), new)


def test_an_interrupted_save_is_said_on_load(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stops = each_step(lambda: ll.save_adapter(adapted(method=METHOD), folder), lambda: None)
    for _ in range(12):
        next(stops)
    ll.load_adapter(TinyMLP(), folder)
    assert "a save that was interrupted is undone; the adapter from before is there" in capsys.readouterr().out


def test_a_rewritten_file_with_new_digests_is_a_file(folder: Path) -> None:
    """Digests tell damage and mixtures; they are no signature."""
    rewrite(folder, lambda description, tensors: tensors["first.adapters.default.lora_A"].zero_())
    ll.load_adapter(TinyMLP(), folder)


def test_rows_of_new_tokens_come_back(tokens: Path) -> None:
    fresh = tiny_decoder()
    ll.load_adapter(fresh, tokens)
    assert torch.equal(fresh(TOKENS).logits, taught()(TOKENS).logits)
