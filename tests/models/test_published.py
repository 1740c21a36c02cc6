from __future__ import annotations

from pathlib import Path

import pytest

from lora_lightning.models.published import hub_id, license_of, pipeline_tag, shown_name

CACHE = "/home/me/.cache/huggingface/hub"


@pytest.mark.parametrize(
    ("name", "known", "shown"),
    [
        ("owner/name", "owner/name", "owner/name"),
        ("gpt2", "gpt2", "gpt2"),
        (f"{CACHE}/models--owner--a-b.c/snapshots/0123", "owner/a-b.c", "owner/a-b.c"),
        (f"{CACHE}/models--gpt2/snapshots/0123", "gpt2", "gpt2"),
        ("/home/me/models/mine", None, "mine"),
        ("./models/mine/", None, "mine"),
        ("~/mine", None, "mine"),
        ("pkg:package/folder", None, "pkg:package/folder"),
        ("random:bert", None, "random:bert"),
        (None, None, "a model that has no name"),
    ],
)
def test_a_name_is_an_id_or_the_last_part_of_a_path(name: str | None, known: str | None, shown: str) -> None:
    assert (hub_id(name), shown_name(name)) == (known, shown)


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert hub_id("owner/name") is None
    assert shown_name("owner/name") == "name"
    assert shown_name(".") == tmp_path.name


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("---\n- a\n---\n", None),
        ("no metadata", None),
        ("---\nlicense: {\n---\n", None),
    ],
)
def test_the_license_is_what_the_bases_card_states(text: str, license: str | None, tmp_path: Path) -> None:
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(text)
    assert license_of(str(tmp_path)) == license


def test_a_card_in_the_hubs_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    here = tmp_path / "models--owner--name"
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text("0123")
    (here / "snapshots" / "0123").mkdir(parents=True)
    (here / "snapshots" / "0123" / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert license_of("owner/name") == "mit"
    assert license_of("owner/other") is None


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("Gemma3ForConditionalGeneration", "image-text-to-text"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("TinyMLP", None),
        (None, None),
    ],
)
def test_the_task_is_that_of_transformers_own_tables(architecture: str | None, tag: str | None) -> None:
    import transformers  # noqa: F401 - nothing is known of a class without it

    assert pipeline_tag(architecture) == tag
