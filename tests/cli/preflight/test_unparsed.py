"""What cannot be parsed: the first reason, and what is known without."""

from __future__ import annotations

import pytest

from lora_lightning.cli.preflight.config import check_config

LATER = "the rest of the config is checked once this can be parsed"

UNPARSED = {
    "unknown keys": (
        {"model.optimzer": "AdamW", "data.init_args.batch_sise": 4, "trainer.max_step": 3, "modle.targets": ["query"]},
        [
            'LabelledText has no "batch_sise". Did you mean "batch_size"',
            'no setting "model.optimzer". Did you mean "model.optimizer"',
            'no setting "trainer.max_step". Did you mean "trainer.max_steps"',
            'no setting "modle.targets". Did you mean "model.targets"',
        ],
    ),
    "unknown classes, of a list the right ones": (
        {
            "model.method": {"class_path": "RosaLoRA", "init_args": {"rank": 2}},
            "data.class_path": "LabeledText",
            "trainer.callbacks": ["KeepBst", {"class_path": "RankPruning"}, {"class_path": "SparsitySchedul"}],
            "trainer.logger": "CSVLoger",
            "trainer.strategy": "ddp",
            "trainer.profiler": "simple",
            "model.optimizer": "adamw.AdamW",
        },
        [
            'data: no data module "LabeledText". Did you mean "LabelledText"',
            'model.method: no method "RosaLoRA". Did you mean "RoseLoRA"',
            'trainer.callbacks: no callback "KeepBst". Did you mean "KeepBest"',
            'trainer.callbacks: no callback "SparsitySchedul". Did you mean "SparsitySchedule"',
            'trainer.logger: no logger "CSVLoger". Did you mean "CSVLogger"',
        ],
    ),
    "one wrong type, and files": (
        {
            "trainer.max_steps": "many",
            "model.pretrained": "./no-model",
            "data.init_args.train": "no.csv",
            "data.init_args.validation": "owner/on-the-hub",
            "data.init_args.test": ["one.csv", "builtin:nothing"],
            "data.init_args.tokenizer": "./no-tok",
        },
        [
            'trainer.max_steps is "many"; it must be a whole number',
            'model.pretrained is "./no-model"; no such folder',
            'data.tokenizer is "./no-tok"; no such folder',
            'data.train is "no.csv"; no such file',
            'data.test is "one.csv"; no such file',
            'data.test is "builtin:nothing"',
        ],
    ),
}


@pytest.mark.parametrize("case", UNPARSED)
def test_what_cannot_be_parsed_shows_the_first_reason_and_what_is_known_without(case, checked):
    changes, expected = UNPARSED[case]
    found = checked(changes)
    listing = "\n".join(found.problems)
    assert found.problems[0].startswith(expected[0]) or expected[0] in found.problems[0], listing
    for text in expected:
        assert sum(text in problem for problem in found.problems) == 1, f"{text!r} in\n{listing}"
    assert len(found.problems) == len(expected), listing
    assert found.notes == [LATER]


def test_flags_are_looked_at_like_configs(checked):
    words = ["--model.rnk", "3", "--trainer.max_steps=many", "--data.train", "no.csv", "--model.method", "RosaLoRA"]
    found = checked({}, *words)
    first, *others = found.problems
    assert first.startswith('trainer.max_steps is "many"; it must')
    starts = ['data.train is "no.csv"; no such', 'model.method: no method "RosaLoRA"', 'no setting "model.rnk". Did']
    assert all(problem.startswith(start) for problem, start in zip(sorted(others), starts, strict=True)), others


def test_what_is_required_is_named(checked, tmp_path):
    (tmp_path / "empty.yaml").write_text("trainer: {max_steps: 4}\n")
    found = check_config(["--config", "empty.yaml"])
    assert len(found.problems) == 1
    keys, _, advice = found.problems[0].partition(" are required: ")
    assert sorted(keys.split(", ")) == ["data", "model.pretrained"]
    assert advice.startswith("give them in a config (--config NAME; there are: ")


def test_a_config_that_is_no_yaml_says_so_and_that_more_was_not_checked(checked, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: {pretrained: [\n")
    found = check_config(["--config", "broken.yaml"])
    assert len(found.problems) == 1
    assert "not valid YAML" in found.problems[0]
    assert found.notes == [LATER]
