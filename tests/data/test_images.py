from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from resuming import SaveAt, assert_equal_runs, at_step, run
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from ll_demo import shapes
from ll_lora import LoRA
from lora_lightning.data import LabelledImages
from lora_lightning.data.inspect import show_examples
from lora_lightning.errors import DataError, SettingsError
from lora_lightning.training.module import AdapterModule

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two folders, dark and light, one of them grey."""
    for number in range(12):
        kind = "dark" if number % 2 else "light"
        (tmp_path / "pictures" / kind).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 100, (10, 12, 3)) + (0 if number % 2 else 150)
        picture = Image.fromarray(pixels.astype("uint8"))
        (picture.convert("L") if number == 3 else picture).save(tmp_path / "pictures" / kind / f"{number}.png")
    return tmp_path / "pictures"


def data_of(source, **settings) -> LabelledImages:
    return LabelledImages(**{"train": str(source), "validation_fraction": 0.0, "batch_size": 4, "size": 8, **settings})


def test_a_folder_of_folders(folder):
    data = data_of(folder)
    data.setup("fit")
    assert data.label_names == ["dark", "light"]
    batches = list(data.train_dataloader())
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(4, 3, 8, 8)] * 3
    for batch in batches:
        means = batch["pixel_values"].mean((1, 2, 3))
        assert torch.equal((means > 0).long(), batch["labels"])  # from -1 to 1, so dark is below 0
    shown = show_examples(data, 1).splitlines()
    assert shown[1].split() == ["train", "12", "dark", "6,", "light", "6"]
    assert shown[-1].endswith(".png: 12 x 10, prepared as (3, 8, 8)")


def test_a_table_of_paths_with_a_processor(folder, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 6, "width": 6}, image_mean=[0.2] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path / "model")
    lines = ["file,kind", "light/0.png,bright", "dark/1.png,dim"]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    settings = {"image": "file", "label": "kind", "size": None, "processor": str(tmp_path / "model")}
    data = data_of(folder / "rows.csv", predict=str(folder / "rows.csv"), **settings)
    data.setup("predict")
    [batch] = data.predict_dataloader()
    expected = processor([Image.open(folder / name.split(",")[0]).convert("RGB") for name in lines[1:]])
    assert torch.equal(batch["pixel_values"], torch.tensor(np.stack(expected["pixel_values"])))
    assert batch["index"].tolist() == [0, 1]
    assert "labels" not in batch
    row = {**data.inputs("predict")[1], "prediction": "dim"}
    assert data.readable(row) == {"file": "dark/1.png", "kind": "dim", "prediction": "dim"}


def test_images_inside_a_table(folder, tmp_path):
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    table = table.map(lambda row: row, features=table.features)
    table.to_parquet(tmp_path / "rows.parquet")
    data = data_of(tmp_path / "rows.parquet", validation_fraction=0.4)
    data.setup("fit")
    counts = [len(data.examples(split)) for split in ("train", "validation")]
    assert sum(counts) == 12
    assert min(counts) > 0
    assert data.label_names == ["dark", "light"]


def test_what_is_held_out_does_not_depend_on_the_place(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "pictures")
    data = data_of(moved, validation_fraction=0.3)
    data.setup("fit")
    names = {value["path"].rpartition("/")[2] for value in data.examples("validation").with_format(None)["image"]}
    moved.rename(folder)
    again = data_of(folder, validation_fraction=0.3)
    again.setup("fit")
    found = {value["path"].rpartition("/")[2] for value in again.examples("validation").with_format(None)["image"]}
    assert names == found


def test_errors_name_file_and_row(folder, tmp_path):
    rows = [{"image": "light/0.png", "label": "a"}, {"image": "light/00.png", "label": "b"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r'row 1 .*: no file "light/00.png" in '):
        data_of(folder / "rows.json").setup("fit")
    (folder / "light" / "00.png").write_text("no picture")
    data = data_of(folder / "rows.json")
    data.setup("fit")
    with pytest.raises(DataError, match=r'image: train, row 1 .*"light/00.png" cannot be read as an image'):
        list(data.train_dataloader())
    with pytest.raises(DataError, match=r"processor is null, and so is size"):
        _ = data_of(folder, size=None).image_processor
    with pytest.raises(DataError, match=r'data.processor is ".*dark"; no image processor can be read there'):
        _ = data_of(folder, processor=str(folder / "dark")).image_processor
    with pytest.raises(SettingsError, match=r"LabelledImages.size is 0; it must be at least 1 pixel"):
        data_of(folder, size=0)


@pytest.mark.slow  # as of texts, but for the workers' images
@pytest.mark.parametrize("workers", [0, 1])
def test_resume(folder, tmp_path, workers):
    saved = tmp_path / "saved.ckpt"

    def fit(callbacks, checkpoint=None, seed=3):
        settings = {"task": "image-classification", "random_config": SIZES, "seed": 1, "linear_baseline": False}
        module = AdapterModule("random:vit", LoRA(rank=2, dropout=0.1), **settings)
        data = data_of(folder, validation=f"{folder}::train", num_workers=workers)
        return run(module, data, tmp_path, callbacks, checkpoint, seed, max_steps=7)

    assert_equal_runs(fit([SaveAt(saved, at_step(4))]), fit([], saved, seed=77))


def test_the_logits_are_those_of_the_plain_model(folder, tmp_path):
    torch.manual_seed(0)
    plain = ViTForImageClassification(ViTConfig(**SIZES, num_labels=2)).eval()
    plain.save_pretrained(tmp_path / "model")
    module = AdapterModule(str(tmp_path / "model"), LoRA(rank=2), task="image-classification", num_labels=2)
    module.configure_model()
    data = data_of(folder)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        ours = module.task.logits(module.model.eval(), batch)
        assert torch.equal(ours, plain(pixel_values=batch["pixel_values"]).logits)


def test_shapes_are_seen_and_stay_the_same():
    table = shapes.table()
    assert table.features["label"].names == ["circle", "cross", "ring", "square", "triangle"]
    assert table[7]["image"] == shapes.table()[7]["image"]
    assert len({row["bytes"] for row in table["image"]}) == len(table)
