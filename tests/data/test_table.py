"""What all data modules share: splits, orders, sizes, and exact positions under a real Trainer."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from ll_demo.pydocs import PyDocs
from lora_lightning.data import Completions, LabelledText
from lora_lightning.errors import DataError, SettingsError

ROWS = [{"prompt": "a b c"[: 1 + 2 * (n % 3)], "completion": "d e f g"[: 1 + 2 * (n % 4)]} for n in range(22)]


class Recorder(LightningModule):
    """Keeps what it is given; trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, dict]] = []
        self.validated: list[dict] = []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, {name: values.tolist() for name, values in batch.items()}))
        return self.number * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def predict_step(self, batch, batch_idx):
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0, **options}
    return Trainer(default_root_dir=folder, **quiet, **options)


pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),  # the rows are tiny
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning 2.6 on torch 2.13
]


@pytest.fixture
def data(write, causal_tokenizer) -> Completions:
    return Completions(
        train=write("train.json", ROWS),
        validation=write("dev.json", ROWS[:5]),
        tokenizer=causal_tokenizer,
        batch_size=2,
        seed=3,
    )


def test_validation_is_in_order_whole_and_once(data, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3).fit(recorder, data)
    rows = [row for batch in recorder.validated for row in batch["input_ids"].tolist()]
    trimmed = [[token for token in row if token != 5] for row in rows]
    assert trimmed == [[token for token in ids if token != 5] for ids in data.examples("validation")["input_ids"]]
    first = recorder.validated[0]
    assert first["window_tokens"] == (first["labels"][:, 1:] != -100).sum()


def test_training_without_validation(write, causal_tokenizer, tmp_path):
    data = Completions(train=write("train.json", ROWS), tokenizer=causal_tokenizer, validation_fraction=0.0)
    recorder = Recorder()
    trainer(tmp_path, max_epochs=1).fit(recorder, data)
    assert recorder.validated == []
    assert data.ready == ["train"]


def test_predict_through_the_trainer(data, tmp_path):
    batches = trainer(tmp_path).predict(Recorder(), data)
    assert torch.cat(batches).tolist() == list(range(5))


def test_ranks_share_the_rows_out(data):
    data.setup("fit")
    parts = []
    for rank in range(2):
        data.trainer = type(
            "T",
            (),
            {
                "distributed_sampler_kwargs": {"num_replicas": 2, "rank": rank},
                "accumulate_grad_batches": 1,
                "limit_train_batches": 1.0,
            },
        )
        parts.append(list(data.train_dataloader().sampler))
    assert sorted(parts[0] + parts[1]) == list(range(22))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_batch_size": 0}, r"PyDocs.validation_batch_size is 0; it must be at least 1, or null"),
        ({"num_workers": -1}, r"PyDocs.num_workers is -1; it must be at least 0"),
        ({"batch_size": 0}, r"PyDocs.batch_size is 0; it must be at least 1"),
    ],
)
def test_sizes_outside_their_rules(settings, message):
    with pytest.raises(SettingsError, match=message):
        PyDocs(**settings)


LABELLED = [{"text": "good film", "label": "positive"}, {"text": "a bad film", "label": "negative"}]


@pytest.fixture
def make(write, encoder_tokenizer):
    def make(rows=LABELLED, **settings) -> LabelledText:
        settings = {"tokenizer": encoder_tokenizer, "validation_fraction": 0.0, **settings}
        return LabelledText(train=write("train.json", rows), **settings)

    return make


def fails(data: LabelledText, message: str, stage: str = "fit") -> None:
    with pytest.raises(DataError, match=message) as error:
        data.setup(stage)
    assert "\n" not in str(error.value)


def test_limit_takes_rows_at_even_steps(make):
    rows = [{"text": f"text {n}", "label": n // 5} for n in range(10)]  # sorted by class
    assert make(rows, limit=4).inputs("train")["text"][:] == ["text 0", "text 2", "text 5", "text 7"]
    assert len(make(rows, limit=99).inputs("train")) == 10


def test_setup_reads_once(make, monkeypatch):
    data = make()
    data.setup("fit")
    first = data.examples("train")
    monkeypatch.setattr(LabelledText, "read", None)
    monkeypatch.setattr(LabelledText, "encode", None)
    data.setup("fit")
    assert data.examples("train") is first


def test_predict_needs_no_labels_and_tells_the_row(make, write):
    data = make(predict=write("new.json", [{"text": "tea"}, {"text": "dog cat"}, {"text": "it"}]), batch_size=2)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2]
    assert set(batches[0]) == {"input_ids", "attention_mask", "token_type_ids", "index"}
    assert data.inputs("predict")["text"][:] == ["tea", "dog cat", "it"]


def test_missing_sources(make, encoder_tokenizer, write):
    fails(make(), r"^LabelledText\.test is null; name a file, a folder or a hub data set\.$", "test")
    fails(make(), r"^LabelledText\.validation is null", "validate")
    fails(make(), r"^LabelledText\.predict is null", "predict")
    fails(LabelledText(tokenizer=encoder_tokenizer), r"^LabelledText\.train is null")
    data = LabelledText(tokenizer=encoder_tokenizer, test=write("test.json", LABELLED))
    fails(data, r"^LabelledText\.labels is null, and so is train, .* list the names in labels\.$", "test")


def test_missing_tokenizer(make):
    fails(make(tokenizer=None), r"^data\.tokenizer is null; set it to the model's path or hub id")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, r"LabelledText\.max_length is 1; it must be at least 2 tokens\."),
        ({"batch_size": 0}, r"LabelledText\.batch_size is 0; it must be at least 1\."),
        ({"limit": 0}, r"LabelledText\.limit is 0; it must be at least 1, or null for all examples\."),
        ({"validation_fraction": 1.0}, r"LabelledText\.validation_fraction is 1\.0; it must lie in \[0, 1\)\."),
    ],
)
def test_settings(settings, message):
    with pytest.raises(SettingsError, match=f"^{message}$"):
        LabelledText(**settings)


class SaveEverywhere(Callback):
    """A checkpoint after every batch, and at each end of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.taken = folder, []

    def save(self, trainer, module, name):
        self.taken.append((self.folder / f"{len(self.taken)}-{name}.ckpt", len(module.trained)))
        trainer.save_checkpoint(self.taken[-1][0])

    def on_train_batch_end(self, trainer, module, *args):
        self.save(trainer, module, "batch")

    def on_validation_end(self, trainer, module):
        self.save(trainer, module, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, module, "epoch")


@pytest.mark.parametrize("limit", [pytest.param(1.0, marks=pytest.mark.slow), 5])
def test_resume_from_any_point_gives_the_same_batches(data, tmp_path, limit):
    options = {"accumulate_grad_batches": 3, "limit_train_batches": limit}
    saves, whole = SaveEverywhere(tmp_path), Recorder()
    trainer(tmp_path, callbacks=[saves], **options).fit(whole, data)
    per_epoch = 11 if limit == 1.0 else limit
    assert [epoch for epoch, _ in whole.trained] == [0] * per_epoch + [1] * per_epoch
    assert len(saves.taken) == 2 * (per_epoch + 2)
    for path, done in saves.taken:
        rest = Recorder()
        trainer(tmp_path, **options).fit(rest, data, ckpt_path=path)
        assert rest.trained == whole.trained[done:], path.name


@pytest.mark.parametrize(("limit", "windows"), [(1.0, [3, 3, 3, 2]), (5, [3, 2]), (0.5, [3, 2])])
def test_windows_are_those_of_the_trainer(data, tmp_path, limit, windows):
    recorder = Recorder()
    fit = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3, limit_train_batches=limit)
    fit.fit(recorder, data)
    assert fit.global_step == len(windows)
    batches = [batch for _, batch in recorder.trained]
    counts = [sum(label != -100 for row in batch["labels"] for label in row[1:]) for batch in batches]
    assert len(batches) == sum(windows)
    for length in windows:
        assert {batch["window_tokens"] for batch in batches[:length]} == {sum(counts[:length])}
        batches, counts = batches[length:], counts[length:]


def test_windows_follow_a_schedule_of_accumulation(data, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 2, 1: 4})]).fit(recorder, data)
    totals = [[batch["window_tokens"] for epoch, batch in recorder.trained if epoch == number] for number in (0, 1)]
    assert [len(list(group)) for _, group in groupby(totals[0])] == [2, 2, 2, 2, 2, 1]
    assert [len(list(group)) for _, group in groupby(totals[1])] == [4, 4, 3]


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_overfit_batches(data, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, overfit_batches=2, max_epochs=1, accumulate_grad_batches=2).fit(recorder, data)
    assert len(recorder.trained) == 2


def test_the_task_that_was_forgotten_is_named_before_anything_of_the_data(make_stream, write):
    """Chat data beside the default task: not the chat template, which is missing too, is what is wrong."""
    data = make_stream(train=write("x.csv", "prompt,completion\na,b\n"), streaming=False)
    data.trainer.lightning_module = SimpleNamespace(task=SimpleNamespace(name="sequence-classification"))
    message = r'^model\.task is "sequence-classification", but the data \(Completions\) serve causal-lm; set'
    with pytest.raises(DataError, match=message):
        data.setup("fit")
    data.trainer.lightning_module.task.name = "causal-lm"
    data.setup("fit")
