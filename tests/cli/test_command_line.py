from pathlib import Path

import pytest

from lora_lightning.cli import command_line as command_line
from lora_lightning.errors import LoraLightningError, PluginError, RunFolderError


def test_an_empty_line_has_no_verb():
    assert command_line.read([]) == command_line.Line(())


def test_a_flag_of_the_parsers_in_front_leaves_no_verb():
    line = command_line.read(["--trainer.max_steps", "3", "fit"])
    assert (line.verb, line.rest) == (None, ("--trainer.max_steps", "3", "fit"))


def test_what_is_not_ours_stays_in_order():
    line = command_line.read(["fit", "--trainer.max_steps", "3", "--model.method=X", "--print_config"])
    assert line.rest == ("fit", "--trainer.max_steps", "3", "--model.method=X", "--print_config")
    assert (line.verb, line.blocked, line.folder, line.resume, line.checkpoint) == ("fit", (), None, False, None)


@pytest.mark.parametrize(
    "words",
    [["-p", "no:one", "fit", "-p=no:two"], ["fit", "-p", "no:one", "-p", "no:two"], ["fit", "-p=no:one", "-p=no:two"]],
)
def test_plugins_are_blocked_from_anywhere(words):
    line = command_line.read(words)
    assert line.blocked == ("one", "two")
    assert line.rest == ("fit",)


@pytest.mark.parametrize("value", ["one", "no:", "yes:one"])
def test_only_no_name_is_understood(value):
    with pytest.raises(PluginError, match=rf'-p {value}: only "no:NAME" is understood'):
        command_line.read(["fit", "-p", value])


def test_argv_itself_is_not_changed(config_folder):
    words = ["-p", "no:one", "fit", "-c", "mine.yaml"]
    command_line.read(words)
    assert words == ["-p", "no:one", "fit", "-c", "mine.yaml"]


@pytest.mark.parametrize(
    "flag", [["--config", "mine.yaml"], ["-c", "mine.yaml"], ["--config=mine.yaml"], ["-c=mine.yaml"]]
)
def test_every_spelling_of_config(config_folder, flag):
    line = command_line.read(["fit", *flag, "--seed_everything", "1"])
    assert line.rest == ("fit", "--config", "mine.yaml", "--seed_everything", "1")
    assert line.configs == ("mine.yaml",)


def test_configs_may_precede_the_verb_and_keep_their_order(config_folder):
    line = command_line.read(["--config", "other.yaml", "fit", "--a", "1", "--config", "mine.yaml"])
    assert line.rest == ("fit", "--config", "other.yaml", "--a", "1", "--config", "mine.yaml")
    assert line.verb == "fit"


def test_a_config_named_like_a_verb_is_not_the_verb(config_folder):
    Path("fit").touch()
    line = command_line.read(["--config", "fit", "validate"])
    assert line.rest == ("validate", "--config", "fit")


def test_the_first_config_names_the_run(config_folder):
    assert command_line.read(["fit", "-c", "other.yaml", "-c", "mine.yaml"]).stem == "other"
    assert command_line.read(["fit"]).stem == "run"
    assert command_line.read(["fit", "--config", "{model: {}}"]).stem == "run"


def test_a_name_is_looked_up_in_the_package(config_folder, carried):
    line = command_line.read(["fit", "--config", "dora", "--config=strategies/ddp"])
    assert line.configs == (str(carried / "dora.yaml"), str(carried / "strategies" / "ddp.yaml"))
    assert line.stem == "dora"


@pytest.mark.parametrize("words", [["fit", "--config"], ["fit", "--config", "--a"], ["fit", "--config="]])
def test_a_config_needs_a_value(words):
    with pytest.raises(LoraLightningError, match=r"--config needs a value: --config NAME or --config PATH\."):
        command_line.read(words)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_run_puts_the_folders_config_first(config_folder, verb):
    line = command_line.read([verb, "--config", "mine.yaml", "--run", "runs/rose/001", "--a=1"])
    assert line.rest == (verb, "--config", "runs/rose/001/config.yaml", "--config", "mine.yaml", "--a=1")
    assert line.configs == ("runs/rose/001/config.yaml", "mine.yaml")
    assert line.folder == Path("runs/rose/001")
    assert line.checkpoint == Path("runs/rose/001/last.ckpt")
    assert not line.resume


def test_resume_keeps_the_folder_and_its_name(config_folder):
    line = command_line.read(["fit", "--resume=runs/rose/001"])
    assert line.rest == ("fit", "--config", "runs/rose/001/config.yaml")
    assert line.resume
    assert line.stem == "rose"


def test_a_checkpoint_that_is_given_wins(config_folder):
    Path("runs/rose/001/last.ckpt").unlink()
    assert command_line.read(["test", "--run", "runs/rose/001", "--ckpt_path", "best.ckpt"]).checkpoint is None
    assert command_line.read(["test", "--run", "runs/rose/001", "--ckpt_path=best.ckpt"]).checkpoint is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["fit", "--resume", "runs/rose/003"], r"no such folder\. Nearest: runs/rose/002, runs/rose/001\."),
        (["fit", "--resume", "runs/roes/001"], r"--resume runs/roes/001: no such folder\. Nearest: runs/rose\."),
        (
            ["test", "--run", "runs/rose/002"],
            r"no config.yaml in it, so it is no run folder\. Nearest: runs/rose/001\.",
        ),
        (["test", "--run", "runs/rose"], r"no config.yaml in it, so it is no run folder\. Runs in it: runs/rose/001\."),
        (["fit", "--resume", "runs/rose/001/last.ckpt"], r"this is a file; give the folder, --resume runs/rose/001\."),
        (
            ["fit", "--run", "runs/rose/001"],
            r"only validate, test, predict takes --run; fit continues a run with --resume",
        ),
        (["test", "--resume", "runs/rose/001"], r"only fit takes --resume; the others read one with --run DIR"),
        (["test", "--run", "a", "--run", "b"], r"--run a and --run b: only one run folder can be given"),
    ],
)
def test_a_wrong_run_folder_names_the_nearest(config_folder, words, text):
    with pytest.raises(RunFolderError, match=text):
        command_line.read(words)


def test_a_run_without_a_checkpoint_says_how_to_start_it_again(config_folder):
    Path("runs/rose/001/last.ckpt").unlink()
    with pytest.raises(RunFolderError, match=r"no last.ckpt in it; .* fit --config runs/rose/001/config.yaml\.$"):
        command_line.read(["fit", "--resume", "runs/rose/001"])


def test_only_predict_takes_its_output_off_the_line():
    line = command_line.read(["predict", "--output", "out.jsonl"])
    assert (line.output, line.rest) == ("out.jsonl", ("predict",))
    line = command_line.read(["export", "run", "--output", "folder"])
    assert (line.output, line.rest) == ("predictions.csv", ("export", "run", "--output", "folder"))
