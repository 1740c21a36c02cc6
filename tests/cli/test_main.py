import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lora_lightning
from lora_lightning import __main__ as program
from lora_lightning import plugins
from lora_lightning.cli import main as command
from lora_lightning.errors import TargetError
from lora_lightning.registry import LIGHT_VERBS

HEAVY = ("torch", "lightning", "jsonargparse", "numpy", "transformers")


@pytest.fixture(autouse=True)
def everything_loaded():
    yield
    plugins.load()


@pytest.fixture
def fail(capsys):
    """The one line on stderr of a command line that ends with 2."""

    def run(*words):
        assert program.main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def cli(monkeypatch):
    """A training command line that only keeps the words it is given."""
    seen = []

    def main(words):
        seen.append(list(words))
        return 0

    def build(words):
        seen.append(list(words))
        raise TargetError("far enough\n  in two lines")

    monkeypatch.setitem(sys.modules, "lora_lightning.cli.lightning", SimpleNamespace(main=main, build=build))
    return seen


def run_python(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, **options)


def test_light_verbs_import_nothing_heavy(tmp_path):
    script = f"""
import sys
from lora_lightning.__main__ import main
for words in ([], ["--help"], ["--version"], ["methods"], ["methods", "-p", "no:ll_rose"], ["show", "LoRA"],
              ["targets", "--help"], ["export", "--help"], ["inspect-data", "--help"]):
    assert main(words) == 0, words
for words in (["fti"], ["show", "LoRAA"], ["cite", "nothing"]):
    assert main(words) == 2, words
print("loaded", [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = run_python("-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "loaded []"


def test_help_names_every_verb_with_its_line_and_the_configs(capsys, monkeypatch):
    monkeypatch.setattr("lora_lightning.cli.configs.config_names", lambda: ["one", "strategies/two"])
    assert program.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in (*command.TRAINING, *LIGHT_VERBS):
        assert f"\n  {verb} " in text
    assert "methods       List installed methods, starts, optimizers, callbacks" in text
    assert "\n  analyse " in text
    assert "Configs here: one, strategies/two" in text
    assert "-p no:NAME" in text
    assert program.main([]) == 0
    assert capsys.readouterr().out == text
    assert program.main(["-p", "no:ll_rose", "-h"]) == 0
    assert capsys.readouterr().out == text
    assert program.main(["-p", "no:ll_weight_change", "-h"]) == 0
    assert "analyse" not in capsys.readouterr().out


def test_version(capsys):
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora_lightning {lora_lightning.__version__}\n"


def test_every_verb_is_a_file_and_every_file_a_verb():
    folder = Path(command.__file__).parent / "verbs"
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem != "__init__"}
    assert files == set(LIGHT_VERBS)


@pytest.mark.parametrize("verb", LIGHT_VERBS)
def test_a_verb_explains_itself(verb, capsys):
    assert program.main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m lora_lightning {verb} ")
    assert " ".join((command._verb(verb).__doc__ or "?").split()) in " ".join(text.split())


def test_a_flag_in_front_of_the_verb(fail):
    assert fail("--trainer.max_steps", "3", "fit").startswith("the verb comes first. Verbs: fit, ")


def test_an_unknown_verb_like_no_other(fail):
    assert fail("zzzz").startswith('no verb "zzzz". Verbs: fit, validate, test, predict, methods, show, cite, targets,')


@pytest.mark.parametrize("verb", command.TRAINING)
def test_training_verbs_get_the_line_as_it_was_typed(cli, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    words = [verb, "-c", "mine.yaml", "-p", "no:ll_rose", "--trainer.max_steps=3"]
    assert program.main(words) == 0
    assert cli == [words]


@pytest.mark.parametrize(("code", "returned"), [(None, 0), (0, 0), (2, 2)])
def test_a_parsers_exit_becomes_the_code(monkeypatch, code, returned):
    def main(words):
        raise SystemExit(code)

    monkeypatch.setitem(sys.modules, "lora_lightning.cli.lightning", SimpleNamespace(main=main))
    assert program.main(["fit"]) == returned


def test_an_exit_with_words_is_left_alone(monkeypatch):
    def main(words):
        raise SystemExit("words")

    monkeypatch.setitem(sys.modules, "lora_lightning.cli.lightning", SimpleNamespace(main=main))
    with pytest.raises(SystemExit, match="words"):
        program.main(["fit"])


def test_another_error_keeps_its_traceback(monkeypatch):
    def main(words):
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules, "lora_lightning.cli.lightning", SimpleNamespace(main=main))
    with pytest.raises(ZeroDivisionError):
        program.main(["fit"])


def test_an_error_of_ours_is_one_line(cli, fail):
    assert fail("targets", "{}") == "far enough in two lines"


@pytest.mark.parametrize("verb", ["targets", "inspect-data"])
def test_verbs_that_build_pass_flags_on(cli, fail, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "other.yaml"):
        Path(name).touch()
    flags = ["--model.targets", "attention", "--data.limit=3"]
    fail(verb, "mine.yaml", *flags)
    fail(verb, "--config", "mine.yaml", *flags)
    fail(verb, "mine.yaml", "-c", "other.yaml", *flags, "-p", "no:ll_rose")
    fail(verb)
    assert cli == [
        ["--config", "mine.yaml", *flags],
        ["--config", "mine.yaml", *flags],
        ["--config", "mine.yaml", "--config", "other.yaml", *flags, "-p=no:ll_rose"],
        [],
    ]


def test_a_blocked_plugin_is_blocked_for_light_verbs(fail):
    text = fail("show", "RoseLoRA", "-p", "no:ll_rose")
    assert text.startswith('show: no method "RoseLoRA".')
    assert text.endswith(" Plugin ll_rose is blocked by -p no:ll_rose.")
    assert fail("methods", "-p", "no:ll_ros").startswith('-p no:ll_ros: no plugin "ll_ros". Did you mean "ll_rose"?')


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["show"], "show: the following arguments are required: NAME."),
        (["export", "run", "--format", "peft"], "export: the following arguments are required: --output."),
        (["export", "run", "--format"], "export: argument --format: expected one argument."),
        (["export", "run", "--format=peft", "--output=x", "--rnk=3"],
         'export: it takes no "--rnk". Did you mean "--rank"?'),
        (["export", "run", "--form", "peft"], "export: the following arguments are required: --output."),
        (["methods", "--zzzz"], 'methods: it takes no "--zzzz".'),
        (["inspect-data", "-n", "many"], "inspect-data: argument -n: invalid int value: 'many'."),
        (["methods", "--run", "here"],
         "--run here: only validate, test, predict takes --run; fit continues a run with --resume DIR."),
    ],
)  # fmt: skip
def test_wrong_words_for_a_verb(fail, words, text):
    assert fail(*words) == text
