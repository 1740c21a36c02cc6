"""Every message goes through a real LightningCLI, which ends when it has parsed."""

from __future__ import annotations

import gc
import sys
import types
from dataclasses import dataclass

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable

from lora_lightning import plugins
from lora_lightning.cli.parser import Parser
from lora_lightning.cli.parser_errors import explain, refused
from lora_lightning.methods import Method


class Round:
    def __init__(self, radius: int = 1):
        pass


class Square:
    def __init__(self, side: int = 1):
        pass


class Classifier(LightningModule):
    def __init__(
        self,
        method: Method,
        pretrained: str,
        optimizer: OptimizerCallable | None = None,
        targets: str | list[str] = "all-linear",
        num_labels: int | None = None,
        shape: Round | Square | None = None,
    ):
        super().__init__()


class PlainTexts(LightningDataModule):
    def __init__(self, path: str = "here", batch_size: int = 4):
        super().__init__()


class NeedsColumn(LightningDataModule):
    def __init__(self, column: str, batch_size: int = 4):
        super().__init__()


@dataclass(frozen=True, kw_only=True)
class Wrapping(Method):
    inner: Method
    other: Method | None = None
    share: float = 0.5

    def build(self, base):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WrappingUnresolvable(Method):
    inner: Method | Unresolvable  # noqa: F821 - as if imported for type checking only

    def build(self, base):
        raise NotImplementedError


class KeptError(Exception):
    pass


class CLI(LightningCLI):
    def parse_arguments(self, parser, args):
        parser.parse_args(args)
        raise KeptError(parser)


VERB = {"allow_abbrev": False, "print_config": "--print_config"}


def start(words, run=True):
    """Parse `words` with a fresh command line; returns its parser."""
    verbs = {verb: dict(VERB) for verb in ("fit", "validate")} if run else {}
    set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_enabled=[Method])
    with pytest.raises(KeptError) as kept:
        CLI(
            Classifier,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "lora_lightning", **VERB, **verbs},
            args=words,
            run=run,
        )
    return kept.value.args[0]


MODEL = {"pretrained": "here", "method": "LoRA"}
WHOLE = ["--model.pretrained=here", "--model.method=LoRA", "--data=PlainTexts"]


@pytest.fixture(scope="module")
def parser():
    """The parser of a command line with verbs."""
    plugins.load()
    return start(["fit", *WHOLE])


@pytest.fixture(scope="module")
def flat_parser():
    """The parser of a command line without verbs, as `targets` uses it."""
    plugins.load()
    return start(WHOLE, run=False)


@pytest.fixture(autouse=True)
def everything_loaded():
    yield
    plugins.load()


@pytest.fixture
def fail(parser, capsys):
    """The one line on stderr when `words` are parsed; checks the exit code."""

    def run(words, parser=parser):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([str(word) for word in words])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def config(tmp_path):
    """The path of a new config with these sections; `model` and `data` are filled in."""

    def write(**sections):
        path = tmp_path / f"config{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump({"model": MODEL, "data": "PlainTexts"} | sections))
        return path

    return write


def installed():
    return f"Installed: {', '.join(sorted(plugins.registry().methods))}."


LORA_TAKES = "It takes: rank, alpha, dropout, "


def test_a_right_line_passes(parser, config):
    parsed = parser.parse_args(["fit", "--config", str(config()), "--trainer.max_steps=3"])
    assert parsed.fit.model.method.class_path == "ll_lora.LoRA"


def test_the_whole_command_line_exits_with_two(capsys):
    plugins.load()
    with pytest.raises(SystemExit) as stop:
        start(["fit", "--model.pretrained=here", "--model.method=RosaLoRA", "--data=PlainTexts"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == f'error: model.method: no method "RosaLoRA". Did you mean "RoseLoRA"? {installed()}\n'
    )


@pytest.fixture
def library(monkeypatch):
    """Adds a class of SGD's to a package of another's, which is gone afterwards."""
    modules = []

    def add(package, name):
        module = types.ModuleType(package)
        monkeypatch.setitem(sys.modules, package, module)
        exec(f"from torch.optim import SGD\nclass {name}(SGD): pass", vars(module))
        modules.append(module)
        return getattr(module, name)

    yield add
    for module in modules:
        vars(module).clear()
    gc.collect()


def test_a_short_name_of_two_packages(fail, config, library):
    for package in ("one_library", "other_library"):
        library(package, "Lion")
    given = config(model={**MODEL, "optimizer": {"class_path": "Lion", "init_args": {"lr": 0.1}}})
    for words in (["--config", given], ["--config", config(), "--model.optimizer", "Lion"]):
        text = fail(["fit", *words])
        assert text.startswith("model.optimizer: Multiple subclasses with name Lion. Give the full class path")
        assert text.endswith("one_library.Lion, other_library.Lion.")


def test_a_short_name_of_torchs_stays_torchs(parser, config, library):
    cls = library("other_library", "AdamW")
    name = cls.__qualname__
    model = {**MODEL, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}}}
    parsed = parser.parse_args(["fit", "--config", str(config(model=model))])
    assert parsed.fit.model.optimizer.class_path == "torch.optim.AdamW"
    assert cls.__qualname__ == name


class TestUnknownMethod:
    TEXT = 'model.method: no method "RosaLoRA". Did you mean "RoseLoRA"? '

    def test_as_a_flag(self, fail):
        assert fail(["fit", "--model.method", "RosaLoRA"]) == self.TEXT + installed()

    @pytest.mark.parametrize(
        "value", ["RosaLoRA", {"class_path": "RosaLoRA"}, {"class_path": "RosaLoRA", "init_args": {"rank": 3}}]
    )
    def test_in_a_config(self, fail, config, value):
        assert fail(["fit", "--config", config(model=MODEL | {"method": value})]) == self.TEXT + installed()

    def test_that_a_later_flag_replaces(self, fail, config):
        words = ["fit", "--config", config(model=MODEL | {"method": "RosaLoRA"}), "--model.method", "LoRA"]
        assert fail(words) == self.TEXT + installed()

    def test_of_a_blocked_plugin(self, parser):
        plugins.load(["ll_rose"])
        message = 'Parser key "model.method":\n  Expected a dot import path string: RoseLoRA'
        assert explain(message, parser) == (
            f'model.method: no method "RoseLoRA". Did you mean "ReLoRA"? {installed()} '
            "Plugin ll_rose is blocked by -p no:ll_rose."
        )

    @pytest.mark.parametrize("name", ["RoseLoRA", "ll_rose.RoseLoRA", "ll_rose.method.RoseLoRA"])
    def test_of_a_blocked_plugin_that_is_imported_already(self, fail, name):
        plugins.load(["ll_rose"])
        text = fail(["fit", "--model.pretrained=here", f"--model.method={name}", "--data=PlainTexts"])
        path = name if "." in name else "ll_rose.RoseLoRA"
        assert text == f"model.method: {path} is part of plugin ll_rose, which is blocked by -p no:ll_rose."

    def test_inside_another(self, fail, config):
        value = {"class_path": "Wrapping", "init_args": {"inner": "RosaLoRA"}}
        text = 'model.method.inner: no method "RosaLoRA". Did you mean "RoseLoRA"? '
        assert fail(["fit", "--config", config(model=MODEL | {"method": value})]) == text + installed()

    def test_inside_another_where_null_would_do(self, fail, config):
        value = {"class_path": "Wrapping", "init_args": {"inner": "LoRA", "other": {"class_path": "RosaLoRA"}}}
        text = 'model.method.other: no method "RosaLoRA". Did you mean "RoseLoRA"? '
        assert fail(["fit", "--config", config(model=MODEL | {"method": value})]) == text + installed()

    def test_inside_one_whose_types_cannot_be_read(self, parser):
        message = (
            'Parser key "model.method":\n'
            f"  Problem with given class_path '{__name__}.WrappingUnresolvable':\n"
            '    Parser key "inner":\n      Expected a dot import path string: RosaLoRA'
        )
        assert explain(message, parser).startswith('model.method.inner: no method "RosaLoRA". Did you mean "RoseLoRA"?')


class TestUnknownField:
    TEXT = f'model.method: LoRA has no "rnak". Did you mean "rank"? {LORA_TAKES}'

    def test_of_a_method_as_a_flag(self, fail):
        assert fail(["fit", *WHOLE, "--model.method.rnak", "3"]).startswith(self.TEXT)

    @pytest.mark.parametrize(
        "value",
        [{"class_path": "LoRA", "init_args": {"rnak": 3}}, {"class_path": "ll_lora.LoRA", "init_args": {"rnak": 3}}],
    )
    def test_of_a_method_in_a_config(self, fail, config, value):
        assert fail(["fit", "--config", config(model=MODEL | {"method": value})]).startswith(self.TEXT)

    def test_of_a_method_in_a_later_config(self, fail, config, tmp_path):
        later = tmp_path / "later.yaml"
        later.write_text("model: {method: {rnak: 4}}")
        assert fail(["fit", "--config", config(), "--config", later]).startswith(self.TEXT)

    def test_of_a_wrapped_method(self, fail, config):
        value = {"class_path": "Wrapping", "init_args": {"inner": "LoRA"}}
        text = fail(["fit", "--config", config(model=MODEL | {"method": value}), "--model.method.inner.rnak=3"])
        assert text.startswith('model.method.inner: LoRA has no "rnak". Did you mean "rank"?')

    def test_of_a_data_module(self, fail, config):
        text = 'data: PlainTexts has no "bath_size". Did you mean "batch_size"? It takes: path, batch_size.'
        assert fail(["fit", *WHOLE, "--data.bath_size", "3"]) == text
        value = {"class_path": "PlainTexts", "init_args": {"bath_size": 3}}
        assert fail(["fit", "--config", config(data=value)]) == text

    def test_of_an_optimizer(self, fail, config):
        text = 'model.optimizer: AdamW has no "lrr". Did you mean "lr"? It takes: lr, betas, '
        assert fail(["fit", *WHOLE, "--model.optimizer=AdamW", "--model.optimizer.lrr=3"]).startswith(text)
        value = {"class_path": "AdamW", "init_args": {"lrr": 3}}
        assert fail(["fit", "--config", config(model=MODEL | {"optimizer": value})]).startswith(text)

    def test_of_a_callback(self, fail, config):
        value = [{"class_path": "EarlyStopping", "init_args": {"monitor": "x", "patiance": 3}}]
        text = fail(["fit", "--config", config(trainer={"callbacks": value})])
        assert text.startswith(
            'trainer.callbacks: EarlyStopping has no "patiance". Did you mean "patience"? It takes: monitor, '
        )


class TestUnknownClass:
    def test_data_module(self, fail, config):
        text = fail(["fit", *WHOLE[:2], "--data", "PlanTexts"])
        assert text.startswith('data: no data module "PlanTexts". Did you mean "PlainTexts"?')
        assert fail(["fit", "--config", config(data={"class_path": "PlanTexts", "init_args": {"path": "x"}})]) == text

    @pytest.mark.parametrize("value", ["AdmW", {"class_path": "AdmW", "init_args": {"lr": 0.1}}])
    def test_optimizer(self, fail, config, value):
        text = fail(["fit", "--config", config(model=MODEL | {"optimizer": value})])
        assert text == 'model.optimizer: no optimizer "AdmW". Did you mean "AdamW"?'

    @pytest.mark.parametrize(
        "section",
        [
            {"callbacks": ["EarlyStoping"]},
            {"callbacks": [{"class_path": "EarlyStoping", "init_args": {"monitor": "x"}}]},
            {"callbacks+": ["EarlyStoping"]},
            {"callbacks+": "EarlyStoping"},
            {"callbacks": ["RichProgressBar", "EarlyStoping"]},
        ],
    )
    def test_callback(self, fail, config, section):
        text = fail(["fit", "--config", config(trainer=section)])
        assert text == 'trainer.callbacks: no callback "EarlyStoping". Did you mean "EarlyStopping"?'

    def test_callback_of_ours(self, fail, config):
        import lora_lightning.callbacks  # noqa: F401 - makes its short names known

        text = fail(["fit", *WHOLE, "--trainer.callbacks+=InjectAdapter"])
        assert text == 'trainer.callbacks: no callback "InjectAdapter". Did you mean "InjectAdapters"?'

    def test_a_callback_like_no_other_lists_them(self, fail):
        text = fail(["fit", *WHOLE, "--trainer.callbacks+=Zzzzzz"])
        assert text.startswith('trainer.callbacks: no callback "Zzzzzz". Installed: ')
        assert "EarlyStopping, " in text

    def test_logger_where_true_would_do(self, fail):
        text = fail(["fit", *WHOLE, "--trainer.logger=CSVLoger"])
        assert text.startswith('trainer.logger: no logger "CSVLoger". Did you mean "CSVLogger"?')


class TestFullPaths:
    @pytest.mark.parametrize(
        ("path", "cause"),
        [
            ("nothing_there.LoRA", "No module named 'nothing_there'"),
            ("ll_lora.LoRAX", "module 'll_lora' has no attribute 'LoRAX'"),
            ("ll_lora.sub.LoRA", "module 'll_lora' has no attribute 'sub'"),
        ],
    )
    @pytest.mark.parametrize("long", [False, True])
    def test_missing(self, fail, config, path, cause, long):
        method = {"class_path": path, "init_args": {}} if long else path
        text = fail(["fit", "--config", config(model=MODEL | {"method": method})])
        assert text == f'model.method: cannot import {path}: {cause}. Did you mean "LoRA"?'

    def test_missing_data_module(self, fail, config):
        text = fail(["fit", "--config", config(data="nothing_there.PlainTexts")])
        assert text.startswith("data: cannot import nothing_there.PlainTexts: No module named 'nothing_there'.")
        assert 'Did you mean "PlainTexts"?' in text

    def test_missing_optimizer(self, fail, config):
        text = fail(["fit", "--config", config(model=MODEL | {"optimizer": "torch.optim.AdmW"})])
        assert text.startswith(
            "model.optimizer: cannot import torch.optim.AdmW: module 'torch.optim' has no attribute 'AdmW'."
        )
        assert text.endswith('Did you mean "AdamW"?')

    def test_what_a_module_itself_cannot_import(self, fail, tmp_path, monkeypatch):
        (tmp_path / "imports_too_much.py").write_text("import nothing_there\n")
        monkeypatch.syspath_prepend(tmp_path)
        text = fail(["fit", *WHOLE, "--model.method=imports_too_much.LoRA"])
        assert text == "model.method: cannot import imports_too_much.LoRA: No module named 'nothing_there'."

    @pytest.mark.parametrize("path", ["collections.OrderedDict", "textwrap.dedent"])
    def test_of_something_else(self, fail, path):
        text = fail(["fit", *WHOLE, f"--model.method={path}"])
        assert text.startswith(f"model.method: Import path {path} does not correspond to a subclass of Method.")
        assert text.endswith(installed())

    def test_of_something_else_for_data_and_optimizer(self, fail):
        text = fail(["fit", *WHOLE, "--data=collections.OrderedDict"])
        assert text.startswith("data: OrderedDict: Import path does not correspond to a subclass of LightningDataMod")
        assert "PlainTexts" in text.partition("Installed: ")[2]
        text = fail(["fit", *WHOLE, "--model.optimizer=collections.OrderedDict"])
        assert text.startswith("model.optimizer: Expected 'collections.OrderedDict' to be a subclass of")
        assert "Installed: " in text
        assert "AdamW, " in text


class TestUnknownKey:
    @pytest.mark.parametrize(
        ("sections", "text"),
        [
            ({"trianer": {"max_steps": 3}}, 'no setting "trianer.max_steps". Did you mean "trainer.max_steps"?'),
            ({"trainer": {"max_step": 3}}, 'no setting "trainer.max_step". Did you mean "trainer.max_steps"?'),
            (
                {"model": MODEL | {"target": "x"}},
                'no setting "model.target". Did you mean "model.targets"? '
                "model takes: method, pretrained, optimizer, targets, num_labels, shape.",
            ),
            (
                {"fit": {"model": {"pretrained": "here"}}},
                'no setting "fit.model.pretrained". Did you mean "model.pretrained"?',
            ),
        ],
    )
    def test_in_a_config(self, fail, config, sections, text):
        assert fail(["fit", "--config", config(**sections)]).startswith(text)

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--trianer.max_steps", "3"], 'no setting "trianer.max_steps". Did you mean "trainer.max_steps"?'),
            (["--trainer.max_step=3"], 'no setting "trainer.max_step". Did you mean "trainer.max_steps"?'),
            (["--resum", "here"], 'no setting "resum". Did you mean "resume"?'),
            (["--zzzz", "--yyyy=3"], 'no setting "zzzz". Top level: '),
        ],
    )
    def test_as_a_flag(self, fail, words, text):
        assert fail(["fit", *WHOLE, *words]).startswith(text)

    def test_every_unknown_flag_is_named(self, fail):
        text = fail(["fit", *WHOLE, "--zzzz", "--yyyy=3"])
        assert 'no setting "zzzz".' in text
        assert 'no setting "yyyy".' in text

    def test_a_config_without_its_flag(self, fail):
        assert fail(["fit", *WHOLE, "mine.yaml"]) == '"mine.yaml" is a config; give it as --config mine.yaml.'

    def test_a_word_alone(self, fail):
        text = '"stray" is no setting; settings are given as --key value, values with blanks in quotes.'
        assert fail(["fit", *WHOLE, "stray"]) == text

    def test_without_a_verb(self, fail, flat_parser, config):
        text = 'no setting "model.target". Did you mean "model.targets"?'
        assert fail([*WHOLE, "--model.target=x"], flat_parser).startswith(text)
        assert fail(["--config", config(model=MODEL | {"target": "x"})], flat_parser).startswith(text)
        text = 'no setting "trianer.max_steps". Did you mean "trainer.max_steps"?'
        assert fail(["--config", config(trianer={"max_steps": 3})], flat_parser).startswith(text)


class TestRequired:
    def test_one(self, fail):
        text = "model.pretrained is required: give it in a config (--config NAME), or as --model.pretrained."
        assert fail(["fit", *WHOLE[1:]]) == text

    def test_a_method_lists_the_installed(self, fail):
        text = "model.method is required: give it in a config (--config NAME), or as --model.method. "
        assert fail(["fit", WHOLE[0], WHOLE[2]]) == text + installed()

    def test_data_lists_the_known(self, fail, flat_parser):
        text = "data is required: give it in a config (--config NAME), or as --data. Installed: "
        assert fail(["fit", *WHOLE[:2]]).startswith(text)
        assert "PlainTexts" in fail(WHOLE[:2], flat_parser)

    def test_several_point_to_configs(self, fail, monkeypatch):
        monkeypatch.setattr("lora_lightning.cli.configs.config_names", lambda: ["one", "two"])
        text = (
            "model.method, model.pretrained, data are required: give them in a config "
            "(--config NAME; there are: one, two), or as flags."
        )
        assert fail(["fit"]) == text

    def test_field_of_a_class(self, fail, config):
        said = "data.column (NeedsColumn) is not given; it must be text."
        assert fail(["fit", *WHOLE[:2], "--data=NeedsColumn"]) == said
        value = [{"class_path": "EarlyStopping", "init_args": {"patience": 3}}]
        text = fail(["fit", "--config", config(trainer={"callbacks": value})])
        assert text == "trainer.callbacks.monitor (EarlyStopping) is not given; it must be text."
        said = "model.method.inner (Wrapping) is not given; it must be a Method."
        assert fail(["fit", *WHOLE, "--model.method=Wrapping"]) == said


class TestNoClassNamed:
    TEXT = (
        "model.method: no method is named. Write model.method: NAME or model.method: {class_path: NAME, "
        "init_args: {...}}, before any setting of it. "
    )

    @pytest.mark.parametrize("value", [{"rank": 3}, {"class_path": "LoRA", "rank": 3}, 3, "Method"])
    def test_method_in_a_config(self, fail, config, value):
        assert fail(["fit", "--config", config(model=MODEL | {"method": value})]) == self.TEXT + installed()

    def test_method_after_its_setting(self, fail):
        assert fail(["fit", "--model.method.rank=3", *WHOLE]) == self.TEXT + installed()

    @pytest.mark.parametrize("value", [{"batch_size": 3}, {"class_path": "PlainTexts", "batch_size": 3}])
    def test_data(self, fail, config, value):
        text = "data: no data module is named. Write data: NAME or data: {class_path: NAME, init_args: {...}}, before"
        assert fail(["fit", "--config", config(data=value)]).startswith(text)


class TestWrongValue:
    @pytest.mark.parametrize(
        ("word", "text"),
        [
            ("--model.method.rank=x", 'model.method.rank is "x"; it must be a whole number.'),
            (
                "--model.method.scaling_rule=alpha/sqrt",
                'model.method.scaling_rule is "alpha/sqrt"; it must be "alpha/r" or "alpha/sqrt(r)".'
                ' Did you mean "alpha/sqrt(r)"?',
            ),
            ("--trainer.max_steps=abc", 'trainer.max_steps is "abc"; it must be a whole number.'),
            ("--model.num_labels=x", 'model.num_labels is "x"; it must be a whole number or null.'),
            (
                "--trainer.enable_model_summary=x",
                'trainer.enable_model_summary is "x"; it must be true or false or null.',
            ),
        ],
    )
    def test_as_a_flag(self, fail, word, text):
        assert fail(["fit", *WHOLE, word]) == text

    def test_inside_classes(self, fail, config):
        value = {"class_path": "Wrapping", "init_args": {"inner": {"class_path": "LoRA", "init_args": {"rank": "x"}}}}
        text = 'model.method.inner.rank is "x"; it must be a whole number.'
        assert fail(["fit", "--config", config(model=MODEL | {"method": value})]) == text

    def test_of_one_of_two_classes(self, fail, config):
        value = {"class_path": f"{__name__}.Square", "init_args": {"side": "x"}}
        text = fail(["fit", "--config", config(model=MODEL | {"shape": value})])
        assert text == 'model.shape.side is "x"; it must be a whole number.'

    def test_a_number_that_might_be_a_tensor(self, fail, config):
        value = {"class_path": "AdamW", "init_args": {"lr": "fast"}}
        text = fail(["fit", "--config", config(model=MODEL | {"optimizer": value})])
        assert text == 'model.optimizer.lr is "fast"; it must be a number.'

    def test_a_mapping_for_a_list(self, fail, config):
        text = fail(["fit", "--config", config(model=MODEL | {"targets": {"a": 3}})])
        assert text == """model.targets is "{'a': 3}"; it must be text or a list."""

    def test_a_word_for_a_section(self, fail, config):
        text = fail(["fit", "--config", config(trainer="fast")])
        said = 'trainer: it must be a mapping of settings, or a file with one; this is "fast". It takes: accelerator, '
        assert text.startswith(said)

    def test_nothing(self, fail):
        assert (
            fail(["fit", *WHOLE, "--trainer.max_steps"])
            == "argument --trainer.max_steps, or a setting in it: expected one argument"
        )


class TestConfigs:
    @pytest.mark.parametrize("text", ["just words", "- a\n- b"])
    def test_no_mapping(self, fail, tmp_path, text):
        (tmp_path / "list.yaml").write_text(text)
        said = f"a config must be a mapping of settings, which this is not: {' '.join(text.split())}"
        assert fail(["fit", "--config", tmp_path / "list.yaml"]) == said

    def test_no_yaml(self, fail, tmp_path):
        (tmp_path / "broken.yaml").write_text("model: [\n")
        text = fail(["fit", "--config", tmp_path / "broken.yaml"])
        assert text.startswith("a config is not valid YAML: while parsing")
        assert "line 2, column 1" in text


def test_text_that_is_not_known_stays_on_one_line(parser):
    message = 'Parser key "model.method":\n  Something quite   new'
    assert explain(message, parser) == "model.method: Something quite new."


def test_debugging_brings_the_parsers_own_words(parser, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(Exception, match="Expected a dot import path string: RosaLoRA"):
        parser.parse_args(["fit", "--model.method", "RosaLoRA"])


class Refusing:
    def __init__(self, cause: str):
        raise ValueError(cause)


@pytest.mark.parametrize(
    ("cause", "text"), [("no  such\nthing", "Refusing: no such thing"), ("Refusing is so.", "Refusing is so.")]
)
@pytest.mark.parametrize("kind", [Refusing | None, Round | list[Refusing] | None])
def test_what_a_class_says_is_found_in_what_the_parser_makes_of_it(kind, cause, text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--shape", type=kind)
    one = {"class_path": f"{__name__}.Refusing", "init_args": {"cause": cause}}
    given = parser.parse_object({"shape": one if kind == Refusing | None else [one]})
    with pytest.raises(ValueError, match="Refusing") as caught:
        parser.instantiate(given)
    assert refused(str(caught.value)) == text


def test_where_the_parser_itself_refuses_no_class_has_said_anything():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--shape", type=Round | Square | None)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_object({"shape": 3})
    assert refused(str(caught.value)) == ""
    assert refused("a sentence") == ""
