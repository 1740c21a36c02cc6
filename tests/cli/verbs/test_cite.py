from dataclasses import dataclass
from typing import ClassVar

import pytest

from lora_lightning import plugins
from lora_lightning.cli.main import main
from lora_lightning.methods import Method


@dataclass(frozen=True, kw_only=True)
class Cascaded(Method):
    """Wraps another."""

    bibtex: ClassVar[str] = "@misc{cascaded}"
    inner: Method
    """Wrapped."""
    others: tuple[Method, ...] = ()
    """More of them."""
    label: str = ""
    """A word that is no method."""

    def build(self, base):
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Unwritten(Method):
    """Without BibTeX; its field only sounds like one that wraps."""

    inner: str = ""
    """A word."""

    def build(self, base):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The installed methods and two more."""
    known = plugins.load()
    more = {"Cascaded": Cascaded, "Unwritten": Unwritten}
    monkeypatch.setattr(known, "methods", known.methods | more)
    monkeypatch.setattr(plugins, "load", lambda blocked=(): known)
    return known


@pytest.fixture
def cite(tmp_path, monkeypatch, capsys):
    """Exit code, stdout and stderr of `cite` over these files."""
    monkeypatch.chdir(tmp_path)

    def run(*texts):
        names = [f"config{i}.yaml" for i in range(len(texts))]
        for name, text in zip(names, texts, strict=True):
            (tmp_path / name).write_text(text)
        code = main(["cite", *names])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def entry(name):
    return plugins.registry().methods[name].bibtex


@pytest.mark.parametrize(
    "text",
    [
        "model: {method: LoRA}",
        "model: {method: ll_lora.LoRA}",
        "model: {method: {class_path: LoRA}}",
        "model: {method: {class_path: ll_lora.method.LoRA, init_args: {rank: 4}}}",
        "trainer: {callbacks: [{class_path: lora_lightning.callbacks.InjectAdapters, init_args: {method: LoRA}}]}",
        "trainer: {callbacks: {class_path: InjectAdapters, init_args: {method: {class_path: LoRA}}}}",
    ],
)
def test_every_way_of_naming_a_method(cite, text):
    assert cite(text) == (0, entry("LoRA") + "\n", "")


def test_wrapped_methods_follow_in_order_and_each_is_printed_once(cite):
    text = """
    model:
      method:
        class_path: Cascaded
        init_args: {inner: RoseLoRA, others: [{class_path: LoRA}, RoseLoRA], label: NotAMethod}
    """
    expected = "\n\n".join(map(entry, ["Cascaded", "RoseLoRA", "LoRA"]))
    assert cite(text, "model: {method: LoRA}") == (0, expected + "\n", "")


@pytest.mark.parametrize("given", ["{inner: LoRA}", "{init_args: {inner: {class_path: LoRA}}}", "{rank: 4}"])
def test_a_file_that_only_changes_the_method_of_another(cite, given):
    code, out, err = cite(f"model: {{method: {given}}}")
    assert (code, out) == (2, "")
    assert err.startswith("error: config0.yaml: model.method: no method is named. Write model.method: NAME or")


def test_several_files(cite):
    code, out, _ = cite("model: {method: RoseLoRA}", "data: PyDocs", "model: {method: LoRA}")
    assert (code, out) == (0, f"{entry('RoseLoRA')}\n\n{entry('LoRA')}\n")


def test_a_method_without_an_entry_is_said(cite):
    text = "% Unwritten: its plugin gives no BibTeX entry.\n"
    assert cite("model: {method: Unwritten}") == (0, text, "")
    assert cite("model: {method: {class_path: Unwritten, init_args: {inner: NoMethod}}}") == (0, text, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data: {method: mean, class_path: LoRAData}",
        "model: {method: null}",
        "model: x",
    ],
)
def test_nothing_to_cite(cite, text):
    assert cite(text) == (0, "config0.yaml: no method is named, nothing to cite.\n", "")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("model: {method: RosaLoRA}", "model.method"),
        ("model: {method: {class_path: Cascaded, init_args: {inner: RosaLoRA}}}", "model.method.inner"),
        ("model: {method: {class_path: Cascaded, init_args: {others: [LoRA, RosaLoRA]}}}", "model.method.others"),
    ],
)
def test_an_unknown_method(cite, text, where):
    code, out, err = cite(text)
    assert (code, out) == (2, "")
    assert err.startswith(f'error: config0.yaml: {where}: no method "RosaLoRA". Did you mean "RoseLoRA"?')


def test_a_class_that_cannot_be_imported(cite):
    code, out, err = cite("model: {method: {class_path: ll_rose.RosaLoRA}}")
    assert (code, out) == (2, "")
    said = "model.method: cannot import ll_rose.RosaLoRA: module 'll_rose' has no attribute 'RosaLoRA'."
    assert err.startswith(f'error: config0.yaml: {said} Did you mean "RoseLoRA"?')


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: [", "config0.yaml: not valid YAML: while parsing a flow node"),
        ("- LoRA", "config0.yaml: a config must be a mapping of settings."),
    ],
)
def test_a_file_that_is_no_config(cite, text, problem):
    code, _, err = cite(text)
    assert code == 2
    assert err.startswith(f"error: {problem}")
    assert err.count("\n") == 1


def test_a_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["cite", str(tmp_path / "binary.yaml")]) == 2
    assert "binary.yaml: cannot be read: " in capsys.readouterr().err


def test_names_are_looked_up_as_config_does(capsys, monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "carried.yaml").write_text("model: {method: LoRA}")
    monkeypatch.setattr("lora_lightning.cli.configs._PACKAGE", tmp_path)
    assert main(["cite", "carried"]) == 0
    assert capsys.readouterr().out == entry("LoRA") + "\n"
    assert main(["cite", "carrried"]) == 2
    error = capsys.readouterr().err
    assert (
        'cite "carrried": no method, start, optimizer or callback of a plugin, no config and no file of that name. '
        in error
    )
    assert 'Did you mean "carried"? Methods: ' in error


def test_optimizers_of_plugins_are_cited_too(cite):
    text = """
model:
  method: LoRA
  optimizer: {class_path: LoRAPlus, init_args: {inner: {class_path: torch.optim.AdamW}}}
"""
    code, out, _ = cite(text)
    assert code == 0
    assert "hu2022lora" in out or "2106.09685" in out
    assert "arXiv:2402.12354" in out
    assert out.count("@") == 2
