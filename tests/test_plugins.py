import builtins
import gc
import importlib
import os
import re
import signal
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from jsonargparse import _typehints
from jsonargparse._typehints import resolve_class_path_by_name  # how a config's short name is read
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from lora_lightning import __main__ as program
from lora_lightning import callbacks, data, hookspecs, plugin_code, plugins  # noqa: F401 - classes are known once imported
from lora_lightning.cli.classes import imported_class, named_classes, short_names
from lora_lightning.errors import DuplicateMethodError, ExportError, PluginError, UnknownMethodError
from lora_lightning.exporters.export import export
from lora_lightning.injection.inject import inject
from lora_lightning.injection.merge_model import merge
from lora_lightning.methods import Method
from lora_lightning.registry import Component, Provider, one_line
from lora_lightning.testing import perturb

OURS = {"CELoRA", "CoRA", "DoRA", "FFALoRA", "GeLoRA", "LoRA", "LoRASC", "MoELoRA", "PRILoRA", "RoseLoRA"}


def some(kinds, count=3):
    """The first few; the others are slow, as each starts a process."""
    values = [kind if isinstance(kind, tuple) else (kind,) for kind in kinds]
    return [pytest.param(*own, marks=() if n < count else pytest.mark.slow) for n, own in enumerate(values)]


def code(
    name, decorator="@dataclass(frozen=True, kw_only=True)", body="def build(self, base): raise NotImplementedError"
):
    """Source of a plugin with one method class."""
    return dedent(
        f"""
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import ClassVar
        from lora_lightning import hookimpl
        from lora_lightning.methods import Method

        {decorator}
        class {name}(Method):
            {body}

        @hookimpl
        def lora_lightning_methods():
            return [{name}]
        """
    )


def installed(registry):
    return ", ".join(sorted(registry.methods))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install plugins for one test: `install(name, source)` writes a module and its `.dist-info`."""
    monkeypatch.setattr(plugins, "_current", None)
    monkeypatch.syspath_prepend(tmp_path)
    names = []
    gc.freeze()  # what is there stays, so that collecting what a plugin leaves takes no time

    def write(name, source, entry=None, package=None, version="1.0"):
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{(package or name).replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package or name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[lora_lightning]\n{entry or f'{name} = {name}'}\n")

    yield write
    for name in names:
        sys.modules.pop(name, None)
    # a class of a plugin that is gone would still be among its base's subclasses, where configs are read from
    plugins._current = None
    _typehints._cached_class_parsers.clear()  # which hold the classes that they are for
    gc.collect()
    gc.unfreeze()


def test_ours_come_through_the_entry_point_group(install):
    registry = plugins.load()
    assert set(registry.methods) >= OURS
    assert registry.providers["LoRA"].plugin == "ll_lora"
    assert registry.providers["LoRA"].package == "lora-lightning"
    assert not registry.failed


def test_a_third_party_method_is_found_with_its_version(install):
    install("ll_extra", code("Extra"), package="some-package", version="2.5")
    registry = plugins.load()
    assert registry.method("Extra").__name__ == "Extra"
    assert registry.providers["Extra"] == Provider("ll_extra", "some-package", "2.5")


BROKEN = {
    "missing_import": (
        "import no_such_module_anywhere",
        r"ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "exception": ("1 / 0", r"ZeroDivisionError: division by zero"),
    "sys_exit": ("import sys; sys.exit(3)", r"SystemExit: 3"),
    "interrupt": ("raise KeyboardInterrupt", r"^KeyboardInterrupt$"),
    "cancelled": ("import asyncio; raise asyncio.CancelledError('no loop')", r"^CancelledError: no loop$"),
    "generator_exit": ("raise GeneratorExit", r"^GeneratorExit$"),
    "stop": ("raise StopIteration('end')", r"^StopIteration: end$"),
    "own_base": ("class Odd(BaseException): pass\nraise Odd('of its own')", r"^Odd: of its own$"),
    "recursion": ("def f(): f()\nf()", r"^RecursionError: "),
    "mute": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
        r"^Mute: \(its message cannot be printed\)$",
    ),
    "interrupting": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): raise KeyboardInterrupt",
        r"^KeyboardInterrupt$",
    ),
    "half_way": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods():\n    raise KeyboardInterrupt\n"
        "    yield 1",
        r"^KeyboardInterrupt$",
    ),
    "none": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): pass",
        r"TypeError: lora_lightning_methods returned None; it must return a list, an empty one where there",
    ),
    "number": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): return 3 + 4j",
        r"TypeError: lora_lightning_methods returned \(3\+4j\), which is no list",
    ),
    "instance": (
        code("Made").replace("return [Made]", "return [Made()]"),
        r"TypeError: lora_lightning_methods returned Made\(\), which is no Method class",
    ),
    "name": (
        code("Named").replace("return [Named]", "return 'Named'"),
        r"TypeError: lora_lightning_methods returned 'N', which is no Method class",
    ),
    "syntax": ("def", r"SyntaxError: "),
    "no_hook": ("x = 1", r"it contributes nothing: no function in it is marked with lora_lightning.hookimpl"),
    "misspelt": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_method(): return []",
        r'no hook "lora_lightning_method" here\. Did you mean "lora_lightning_methods"\? It needs a newer core than '
        r"\d\S+, or the name is misspelt$",
    ),
    "newer": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_zzz(): return []",
        r'no hook "lora_lightning_zzz" here\..* It needs a newer core than',
    ),
    "argument": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(model): return []",
        r"PluginValidationError: .*lora_lightning_methods.*model",
    ),
    "raising": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): raise OSError('no disk')",
        r"OSError: no disk",
    ),
    "exiting": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): raise SystemExit('bye')",
        r"SystemExit: bye",
    ),
    "no_list": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): return 3",
        r"TypeError: lora_lightning_methods returned 3, which is no list",
    ),
    "no_method": (
        "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_methods(): return [dict]",
        r"TypeError: lora_lightning_methods returned <class 'dict'>, which is no Method class",
    ),
    "abstract": (code("Unfinished", body="pass"), r"TypeError: method Unfinished does not implement build"),
    "undecorated": (
        code("Bare", decorator="", body="rank: int = 8\n\n            def build(self, base): ..."),
        r"TypeError: method Bare has the field rank but no @dataclass\(frozen=True, kw_only=True\)",
    ),
    "twice": (code("Double").replace("return [Double]", "return [Double, Double]"), r"it provides Double twice"),
    "api": (
        "requires_api = '>=3'\nfrom lora_lightning.not_yet import anything",
        r'PluginError: requires_api is ">=3", and the plugin interface of this core \(\S+\) is 2\.\d+; it needs',
    ),
    "api_computed": (
        code("Extra") + "requires_api = '>=' + '3'",
        r'requires_api is ">=3", and the plugin interface of this core',
    ),
    "api_unreadable": (
        "requires_api = 'newest'",
        r'requires_api is "newest"; it must be a range of versions such as ">=2,<3"$',
    ),
}


@pytest.mark.parametrize("kind", some(BROKEN))
def test_a_broken_plugin_is_recorded_and_the_others_live(install, kind):
    source, cause = BROKEN[kind]
    install(f"ll_a_{kind}", dedent(source))
    install("ll_sound", code("Sound"))
    registry = plugins.load()
    assert set(registry.failed) == {f"ll_a_{kind}"}
    assert set(registry.methods) >= {*OURS, "Sound"}
    text = one_line(registry.failed[f"ll_a_{kind}"])
    assert "\n" not in text
    assert re.search(cause, text), text


@pytest.mark.slow
@pytest.mark.parametrize("hook", some(name for name in vars(hookspecs) if name.startswith("lora_lightning_")))
def test_a_hook_that_returns_none_is_named(install, hook):
    """A forgotten `return` looks like a plugin that brings nothing."""
    install("ll_silent", answering(hook, "pass"))
    install("ll_sound", code("Sound"))
    registry = plugins.load()
    plugins.base_layer_kinds(registry)
    lists = ("lora_lightning_methods", "lora_lightning_starts", "lora_lightning_base_layers")
    form = "list" if hook in lists else "mapping"
    text = f"TypeError: {hook} returned None; it must return a {form}, an empty one where there is nothing to give"
    assert {name: one_line(cause) for name, cause in registry.failed.items()} == {"ll_silent": text}
    assert "Sound" in registry.methods


@pytest.mark.slow
@pytest.mark.parametrize("hook", some(name for name in vars(hookspecs) if name.startswith("lora_lightning_")))
def test_a_hook_that_returns_nothing_to_give_is_none_of_the_failures(install, hook):
    empty = "[]" if hook in ("lora_lightning_methods", "lora_lightning_base_layers") else "{}"
    install("ll_empty", answering(hook, f"return {empty}"))
    registry = plugins.load()
    plugins.base_layer_kinds(registry)
    assert not registry.failed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "cause"),
    some(
        [
            ("!", r"^AttributeError: |^ValueError: "),
            ("no_such_module_anywhere", r"^ModuleNotFoundError: "),
            ("os:no_such_name", r"^AttributeError: "),
            ("math", r"^PluginError: it contributes nothing: no function in it is marked with"),
            ("math:pi", r"^PluginError: it contributes nothing"),
        ]
    ),
)
def test_an_entry_point_that_leads_nowhere(install, value, cause):
    install("unused", "", entry=f"ll_odd = {value}")
    install("ll_sound", code("Sound"))
    registry = plugins.load()
    assert re.search(cause, one_line(registry.failed["ll_odd"]))
    assert "Sound" in registry.methods
    assert plugins.load(["ll_odd"]).blocked == {"ll_odd": value.partition(":")[0]}


def test_a_range_of_interfaces_that_cannot_be_read(install):
    odd = "class Odd:\n    def __str__(self): raise OSError('no text')\n\nrequires_api = Odd()\n1 / 0\n"
    install("ll_odd", odd)
    install("ll_odd_too", odd.replace("1 / 0", "") + code("Extra").replace("from __future__ import annotations", ""))
    failed = plugins.load().failed
    assert one_line(failed["ll_odd"]) == "ZeroDivisionError: division by zero"
    assert one_line(failed["ll_odd_too"]) == "OSError: no text"


def test_ctrl_c_while_a_plugin_is_loaded_ends_the_command(install):
    install("ll_a_long", "import signal; signal.raise_signal(signal.SIGINT)")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        plugins.load()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "named"), [(8.0, True), (2.0, True), (0.5, False)])
def test_a_plugin_that_takes_seconds_is_named(install, capsys, monkeypatch, seconds, named):
    """The clock is moved by the plugin itself."""
    time = [0.0]
    monkeypatch.setattr(plugin_code, "clock", lambda: time[0])
    monkeypatch.setattr(plugin_code, "test_time", time, raising=False)
    moved = f"from lora_lightning import plugin_code\nplugin_code.test_time[0] += {seconds}\n"
    install("ll_a_download", code("Slow") + moved)
    install("ll_b_quick", code("Quick"))
    assert program.main(["methods"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("slow: ")]
    text = f"slow: ll_a_download takes {seconds} s to load; what takes long belongs inside its functions"
    assert lines == ([text] if named else [])
    assert "Slow" in out


PRINTING = {
    "print": "print('Welcome to ll_loud!', 7)",
    "write": "import sys; sys.stdout.write('Welcome to ll_loud! 7\\n')",
    "lines": "import sys; sys.stdout.writelines(['Welcome to ll_loud!', ' 7\\n'])",
    "colour": "import rich.console; rich.console.Console().print('Welcome to ll_loud!', 7)",
    "log": (
        "import logging, sys\nlog = logging.getLogger('ll_loud')\nlog.addHandler(logging.StreamHandler(sys.stdout))\n"
        "log.warning('Welcome to ll_loud! 7')\nlog.handlers.clear()"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(PRINTING))
def test_a_plugin_that_prints_while_it_is_loaded_is_named(install, capsys, kind):
    install("ll_loud", code("Loud") + PRINTING[kind])
    assert program.main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert "Loud" in out
    assert out.splitlines()[-1] == (
        'prints: ll_loud prints "Welcome to ll_loud! 7" while it is loaded, to standard error; it should print nothing '
        "there"
    )
    assert err == "Welcome to ll_loud! 7\n"


def test_a_plugin_that_changes_the_process_is_named_and_one_that_would_end_it_fails(install, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    install("ll_a_moves", code("Moves") + "import os, sys; os.chdir('/'); sys.argv.append('x')")
    install("ll_b_ends", "import os; os._exit(3)")
    assert program.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "Moves" in out
    assert "failed: ll_b_ends: PluginError: it calls os._exit, which would end the program\n" in out
    assert "changes: ll_a_moves changes the working directory and changes sys.argv while it is loaded; it should" in out


def test_what_a_plugin_prints_is_in_no_light_verbs_output(install, capsys):
    """At import, in a hook, and in the module of a class that a verb shows."""
    body = f"print('at import')\n        {SGD}"
    install("ll_loud", answering("lora_lightning_optimizers", "print('in a hook'); return {'MySGD': 'll_loud2:MySGD'}"))
    install("ll_loud2", answering("lora_lightning_callbacks", "return {}", body))
    for words in (["--version"], ["cite", "LoRA"], ["show", "MySGD"], ["-p", "no:ll_loud", "methods"]):
        sys.modules.pop("ll_loud2", None)
        assert program.main(words) == 0
        out = capsys.readouterr().out
        assert "in a hook" not in out
        assert ("at import" in out) == (words[-1] == "methods")  # which names it
    assert 'prints: ll_loud2 prints "at import"' in out


def test_what_a_plugin_does_to_standard_output_is_undone(install, capsys):
    install("ll_a_closes", code("Closes") + "import sys; sys.stdout.close()")
    install("ll_b_replaces", code("Replaces") + "import io, sys; sys.stdout = io.StringIO()")
    install("ll_c_keeps", code("Keeps") + "import sys; kept = sys.stdout")
    stdout = sys.stdout
    assert not plugins.load().failed
    assert sys.stdout is stdout
    print("after", file=importlib.import_module("ll_c_keeps").kept)
    assert capsys.readouterr() == ("after\n", "")


def test_an_import_of_a_class_or_format_that_ends_is_an_error_of_ours(install, capsys, tmp_path):
    (tmp_path / "ll_ends_inner.py").write_text("raise KeyboardInterrupt('at import')\n")
    install(
        "ll_ends",
        answering("lora_lightning_optimizers", "return {'Ends': 'll_ends_inner:Ends'}")
        + answering("lora_lightning_exporters", "return {'ends': 'll_ends_inner'}")
        + answering("lora_lightning_commands", "return {'end': 'll_ends_inner'}"),
    )
    registry = plugins.load()
    assert not registry.failed
    text = "importing ll_ends_inner raises KeyboardInterrupt(at import)"
    assert program.main(["show", "Ends"]) == 2
    assert text in capsys.readouterr().err
    assert program.main(["--help"]) == 0
    assert f"failed: PluginError: {text}" in capsys.readouterr().out
    assert program.main(["end"]) == 2
    assert text in capsys.readouterr().err
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert text in one_line(registry.unusable["Ends"])
    assert "SlowFast" in registry.classes
    with pytest.raises(PluginError, match=re.escape(text)):
        export(torch.nn.Linear(2, 2), tmp_path / "out", "ends")


LINES = {
    "missing_import": "failed: ll_a_missing_import: ModuleNotFoundError: No module named 'no_such_module_anywhere'\n",
    "sys_exit": "failed: ll_a_sys_exit: SystemExit: 3\n",
    "misspelt": 'no hook "lora_lightning_method" here. Did you mean "lora_lightning_methods"?',
    "newer": 'no hook "lora_lightning_zzz" here.',
    "api": 'failed: ll_a_api: PluginError: requires_api is ">=3", and the plugin interface of this core',
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(LINES))
def test_the_command_line_survives_a_broken_plugin(install, capsys, kind):
    install(f"ll_a_{kind}", dedent(BROKEN[kind][0]))
    assert program.main(["methods"]) == 0
    assert LINES[kind] in capsys.readouterr().out
    assert program.main(["show", "RoseLoRA"]) == 0
    assert program.main(["show", "Extra"]) == 2
    assert f"Plugin ll_a_{kind} failed to load: " in capsys.readouterr().err


def test_the_command_line_survives_taken_names(install, capsys):
    install("ll_copy", code("RoseLoRA"), package="some-package")
    install("ll_words", answering("lora_lightning_commands", "return {'show': 'x'}"))
    install("ll_format", answering("lora_lightning_exporters", "return {'peft': 'x'}"))
    assert program.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert 'refused: two plugins provide a method "RoseLoRA": ll_copy (some-package 1.0) and ll_rose' in out
    assert (
        'failed: ll_words: PluginError: lora_lightning_commands: verb "show" of ll_words has a name that is taken, by '
        "core; it must have another one\n" in out
    )
    assert 'format "peft" of ll_format has a name that is taken, by lora_lightning.exporters.peft.write;' in out
    assert program.main(["show", "LoRA"]) == 0
    assert program.main(["show", "RoseLoRA"]) == 2
    assert "Block one with -p no:ll_rose." in capsys.readouterr().err
    assert program.main(["-p", "no:ll_copy", "show", "RoseLoRA"]) == 0


@pytest.mark.slow
def test_a_plugin_that_is_slow_to_import_is_named(install, tmp_path):
    install("ll_heavy", code("Heavy") + "import torch")
    install("ll_quick", code("Quick"))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    words = [sys.executable, "-m", "lora_lightning", "methods"]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("slow: ")] == [
        "slow: ll_heavy imports torch while it is loaded; functions should import them inside"
    ]
    assert "Heavy" in done.stdout


def test_a_plugin_of_this_interface_is_loaded(install):
    install("ll_fits", code("Fits") + "requires_api = '>=2.0,<3'")
    assert plugins.load().method("Fits").__name__ == "Fits"


def test_two_broken_plugins_do_not_blame_each_other(install):
    hook = "from lora_lightning import hookimpl\n@hookimpl\ndef lora_lightning_{}(): return []\n"
    install("ll_a", hook.format("first"))
    install("ll_b", hook.format("second"))
    failed = plugins.load().failed
    assert 'no hook "lora_lightning_first"' in str(failed["ll_a"])
    assert 'no hook "lora_lightning_second"' in str(failed["ll_b"])


def test_an_unknown_method_names_every_failed_plugin_with_its_cause(install):
    install("ll_broken", "import no_such_module_anywhere")
    text = (
        f'method: no method "RosaLoRA". Did you mean "RoseLoRA"? Installed: {installed(plugins.load())}. '
        "Plugin ll_broken failed to load: ModuleNotFoundError: No module named 'no_such_module_anywhere'."
    )
    with pytest.raises(UnknownMethodError) as caught:
        plugins.method("RosaLoRA")
    assert str(caught.value) == text


def test_where_the_name_stood_is_said():
    with pytest.raises(UnknownMethodError, match=r'^model\.method: no method "Nothing"\.'):
        plugins.load().method("Nothing", where="model.method")


def test_one_name_from_two_plugins_names_both_owners(install):
    install("ll_one", code("Twin"), package="first-package", version="1.1")
    install("ll_two", code("Twin"), package="second-package", version="2.2")
    text = (
        'two plugins provide a method "Twin": ll_one (first-package 1.1) and ll_two (second-package 2.2). '
        "Block one with -p no:ll_two."
    )
    both = plugins.load()
    assert {"LoRA", "RoseLoRA"} <= set(both.methods)
    with pytest.raises(DuplicateMethodError) as caught:
        both.method("Twin")
    assert str(caught.value) == both.explain_unknown("Twin") == text
    assert plugins.load(["ll_two"]).providers["Twin"].plugin == "ll_one"
    assert plugins.load(["ll_one"]).providers["Twin"].plugin == "ll_two"


def test_a_failed_load_leaves_the_current_registry():
    before = plugins.load()
    with pytest.raises(PluginError, match=r"-p no:ll_nothing: no plugin"):
        plugins.load(["ll_nothing"])
    assert plugins.registry() is before


def test_two_packages_with_one_plugin_name_are_both_known(install):
    install("ll_same", code("Same"), package="package-a")
    install("ll_other", code("Other"), entry="ll_same = ll_other", package="package-b")
    registry = plugins.load()
    loaded = registry.providers.get("Same") or registry.providers["Other"]
    other = "package-b" if loaded.package == "package-a" else "package-a"
    assert str(registry.failed[f"ll_same ({other} 1.0)"]) == "another plugin has that name already"


def test_a_blocked_plugin_is_not_imported(install):
    install("ll_closed", code("Closed") + "raise RuntimeError('imported')\n")
    registry = plugins.load(["ll_closed"])
    assert "ll_closed" not in sys.modules
    assert "Closed" not in registry.methods
    assert registry.blocked == {"ll_closed": "ll_closed"}
    assert registry.explain_unknown("Closed") == (
        f'no method "Closed". Did you mean "LoRS"? Installed: {installed(registry)}. '
        "Plugin ll_closed is blocked by -p no:ll_closed."
    )


def test_a_blocked_plugin_is_named_for_another_unknown_method(install):
    registry = plugins.load(["ll_rose"])
    assert registry.explain_unknown("LoRAA") == (
        f'no method "LoRAA". Did you mean "LoRA"? Installed: {installed(registry)}. '
        "Plugin ll_rose is blocked by -p no:ll_rose."
    )


def test_a_plugin_inside_a_package_is_blocked_without_importing_the_package(install, tmp_path):
    (tmp_path / "outer_package" / "inner").mkdir(parents=True)
    (tmp_path / "outer_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "outer_package" / "inner" / "__init__.py").write_text(code("Deep"))
    install("unused_a", "", entry="ll_deep = outer_package.inner")
    assert plugins.load(["ll_deep"]).blocked == {"ll_deep": "outer_package.inner"}
    assert "outer_package" not in sys.modules


def test_a_blocked_plugin_that_is_gone_is_still_blocked(install):
    install("unused", "", entry="ll_gone = no_such_package")
    assert plugins.load(["ll_gone"]).blocked == {"ll_gone": "no_such_package"}


def test_blocking_an_unknown_plugin_is_an_error():
    with pytest.raises(
        PluginError,
        match=r'^-p no:ll_ros: no plugin "ll_ros"\. Did you mean "ll_rose"\? Installed: ll_adalora, ',
    ):
        plugins.load(["ll_ros"])


def test_a_full_path_does_not_get_around_blocking(install):
    registry = plugins.load(["ll_rose"])
    with pytest.raises(
        PluginError, match=r"^model\.method: ll_rose\.RoseLoRA is part of plugin ll_rose, which is blocked by"
    ):
        registry.refuse_blocked("ll_rose.RoseLoRA", "model.method")
    registry.refuse_blocked("ll_lora.LoRA", "model.method")
    registry.refuse_blocked("ll_rose_garden.RoseLoRA", "model.method")


def test_the_registry_loads_itself_once(monkeypatch):
    monkeypatch.setattr(plugins, "_current", None)
    first = plugins.registry()
    assert plugins.registry() is first
    assert issubclass(plugins.method("LoRA"), Method)


def test_loading_imports_neither_torch_nor_lightning():
    script = (
        "import sys; from lora_lightning import plugins; plugins.load()\n"
        "print([name for name in ('torch', 'lightning', 'jsonargparse', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


# -- optimizers, callbacks and verbs -----------------------------------------------------------------------------------

BASES = {
    "lora_lightning_optimizers": Optimizer,
    "lora_lightning_callbacks": Callback,
    "lora_lightning_datamodules": LightningDataModule,
}


def answering(hook, answer, body=""):
    """Source of a plugin with one hook beside its class `Mine`."""
    return dedent(
        f"""
        from lora_lightning import hookimpl
        {body}

        @hookimpl
        def {hook}():
            {answer}
        """
    )


SGD = "from torch.optim import SGD\n\n        class MySGD(SGD):\n            pass"


def test_hook_lora_lightning_optimizers(install):
    install("ll_extra", answering("lora_lightning_optimizers", "return {'MySGD': 'll_extra:MySGD'}", SGD))
    registry = plugins.load()
    assert registry.components["MySGD"] == Component("MySGD", "optimizer", "ll_extra:MySGD", "ll_extra")
    assert not registry.classes
    plugins.load_classes(registry, BASES)
    plugin, cls = registry.classes["MySGD"]
    assert plugin == "ll_extra"
    assert issubclass(cls, Optimizer)
    assert {"RiemannianAdamW", "LoRAPlus", "SlowFast"} <= set(registry.classes)


def test_hook_lora_lightning_callbacks(install):
    body = "from lightning.pytorch.callbacks import Callback\n\n        class Mine(Callback):\n            pass"
    install("ll_extra", answering("lora_lightning_callbacks", "return {'Mine': 'll_extra:Mine'}", body))
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert registry.classes["Mine"][0] == "ll_extra"
    assert not registry.failed


def test_hook_lora_lightning_datamodules(install, capsys):
    body = "from lightning.pytorch import LightningDataModule as Base\n\n        class Rows(Base):\n            pass"
    install("ll_extra", answering("lora_lightning_datamodules", "return {'Rows': 'll_extra:Rows'}", body))
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert registry.classes["Rows"][0] == "ll_extra"
    assert "Rows" in short_names([LightningDataModule])
    assert program.main(["methods"]) == 0
    assert "datamodules: PyDocs (ll_demo), Rows (ll_extra)\n" in capsys.readouterr().out


WRITER = """from lora_lightning.exporters.report import Written

        def write(source, folder, rank, verify):
            (folder / "paths.txt").write_text(" ".join(source.layers))
            return Written(kind="paths", layers=len(source.layers), difference=None)
"""


def test_hook_lora_lightning_exporters(install, capsys, tmp_path):
    install("ll_extra", answering("lora_lightning_exporters", "return {'paths': 'll_extra'}", WRITER))
    install("ll_gone", answering("lora_lightning_exporters", "return {'gone': 'no_such_module_anywhere'}"))
    install("ll_odd", answering("lora_lightning_exporters", "return {'odd': 'll_odd'}", "def write(*_): return 3"))
    plugins.load()
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    inject(model, plugins.method("LoRA")(rank=2), ["0"], also_train=(), seed=0)
    assert export(model, tmp_path / "out", "paths").files == ("README.md", "paths.txt", "lora_lightning.json")
    assert (tmp_path / "out" / "paths.txt").read_text() == "0"
    with pytest.raises(ExportError, match='rank is 2 with format="paths"; it must be at least 1, for a format that'):
        export(model, tmp_path / "other", "paths", rank=2)
    with pytest.raises(PluginError, match='format "gone": its module no_such_module_anywhere fails: ModuleNotFoundErr'):
        export(model, tmp_path / "other", "gone")
    with pytest.raises(PluginError, match=r'format "odd": ll_odd\.write returned 3, which is no Written'):
        export(model, tmp_path / "other", "odd")
    assert not (tmp_path / "other").exists()
    assert program.main(["export", "--help"]) == 0
    assert "--format delta|gguf|merged|peft|paths" in capsys.readouterr().out
    assert program.main(["export", str(tmp_path), "--format", "path", "--output", str(tmp_path / "other")]) == 2
    assert 'format is "path". Did you mean "paths"? Known: delta, gguf, merged, peft, paths' in capsys.readouterr().err
    assert program.main(["methods"]) == 0
    assert "formats: paths" in capsys.readouterr().out
    words = ["-p", "no:ll_extra", "export", str(tmp_path), "--format", "paths", "--output", str(tmp_path / "other")]
    assert program.main(words) == 2
    assert 'format is "paths". Known: delta, gguf, merged, peft, gone, odd.' in capsys.readouterr().err


def test_hook_lora_lightning_commands(install, capsys):
    body = (
        '"""Say hello."""\n        import argparse\n        def add_arguments(parser): parser.add_argument("name")\n'
        "        def run(args):\n            print(f'hello {args.name}')\n            return 0"
    )
    install("ll_hello", answering("lora_lightning_commands", "return {'hello': 'll_hello'}", body).lstrip())
    assert plugins.load().commands["hello"] == "ll_hello"
    assert program.main(["hello", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert program.main(["--help"]) == 0
    assert "\n  hello " in capsys.readouterr().out
    assert program.main(["hello", "you", "--loud"]) == 2
    assert program.main(["-p", "no:ll_hello", "hello", "you"]) == 2
    assert 'no verb "hello"' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "told"),
    some(
        [
            ("raise RuntimeError('disk\\nfull')", "RuntimeError: disk full"),
            ("raise KeyError('x')", "KeyError: 'x'"),
            ("assert False", "AssertionError"),
            ("import nothing_there", "ModuleNotFoundError: No module named 'nothing_there'"),
            ("return None", "TypeError: "),
            ("return 'done'", "ValueError: "),
            ("raise OSError(28, 'No space left')", "OSError: [Errno 28] No space left"),
        ]
    ),
)
def test_a_verb_that_raises_anything_is_one_line_with_its_plugin(install, capsys, monkeypatch, raised, told):
    body = f'"""Say hello."""\n        def add_arguments(parser): pass\n        def run(args): {raised}'
    install("ll_hello", answering("lora_lightning_commands", "return {'hello': 'll_hello'}", body).lstrip())
    assert program.main(["hello"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: hello: it failed in ll_hello, of the plugin ll_hello (" in error
    assert told in error
    assert "LORA_LIGHTNING_DEBUG=1 brings the traceback" in error
    monkeypatch.setenv("LORA_LIGHTNING_DEBUG", "1")
    with pytest.raises(getattr(builtins, told.partition(":")[0])):
        program.main(["hello"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "key"),
    some(
        [
            (b"\xff\xfe[lora", "stranger"),
            (b"[lora_lightning]\nx\n", "stranger"),
            (b"[other]\n\xe9 = x\n", "stranger"),
            (b"[lora_lightning]\n= x\n", ""),
            (b"[lora_lightning]\nx = \n", "x"),
            (b"[lora_lightning]\nx = !!\n", "x"),
        ]
    ),
)
def test_a_strangers_corrupt_entry_points_are_survived_and_named(install, tmp_path, monkeypatch, capsys, text, key):
    """Those that Python can read no line of by the package, others by the name that they give."""
    install("ll_mine", code("Mine"))
    folder = tmp_path / "stranger" / "stranger-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_bytes(text)
    monkeypatch.syspath_prepend(str(folder.parent))
    registry = plugins.load()
    assert set(registry.methods) >= OURS | {"Mine"}
    assert ("entry_points.txt cannot be read" in str(registry.failed[key])) == (key == "stranger")
    assert program.main(["methods"]) == 0
    assert f"failed: {key}" in capsys.readouterr().out
    assert plugins.package_of("ll_mine")


HALVES = """import torch
        from torch import nn
        from torch.nn import functional as F
        from lora_lightning.adapters.layers.quantized import QuantizedBase

        class Halved(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.weight = nn.Parameter((2 * layer.weight.data).bfloat16(), requires_grad=False)

            def forward(self, x):
                return F.linear(x, self.weight.to(x.dtype) / 2)

        class HalvedBase(QuantizedBase):
            def dequantize(self):
                return self.module.weight.float() / 2

        def halved(module):
            if type(module).__name__ != "Halved":
                return None
            return HalvedBase(module, "halves", 6, 5, torch.float32)
"""


def test_hook_lora_lightning_base_layers(install):
    install("ll_halves", answering("lora_lightning_base_layers", "return [halved]", HALVES))
    plugins.load()
    plain = torch.nn.Linear(6, 5, bias=False)
    model = torch.nn.Sequential(importlib.import_module("ll_halves").Halved(plain))
    report = inject(model, plugins.method("LoRA")(rank=2), ["0"], also_train=(), seed=0)
    assert report.layers == {"0": ("linear, halves", 6, 5)}
    perturb(model[0].adapter("default"))
    x = torch.randn(3, 6)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected)
    assert type(model[0].base) is torch.nn.Linear
    install("ll_halves_again", answering("lora_lightning_base_layers", "return [halved]", HALVES))
    plugins.load()
    with pytest.raises(PluginError, match="Halved is served by ll_halves and ll_halves_again; leave one out with -p"):
        inject(
            torch.nn.Sequential(importlib.import_module("ll_halves").Halved(plain)),
            plugins.method("LoRA")(rank=2),
            ["0"],
        )


def test_a_kind_that_makes_something_else(install):
    install("ll_wrong", answering("lora_lightning_base_layers", "return [lambda module: 3]"))
    plugins.load()
    with pytest.raises(PluginError, match="ll_wrong: lora_lightning_base_layers made 3 of a Sequential"):
        inject(torch.nn.Sequential(torch.nn.Linear(6, 5)), plugins.method("LoRA")(rank=2), ["0"])


@pytest.mark.parametrize("answer", ["return [3]", "raise ImportError('no such package')"])
def test_kinds_that_fail_leave_the_others(install, answer):
    install("ll_wrong", answering("lora_lightning_base_layers", answer))
    registry = plugins.load()
    inject(torch.nn.Sequential(torch.nn.Linear(6, 5)), plugins.method("LoRA")(rank=2), ["0"])
    assert "ll_wrong" in registry.failed
    assert "ll_quantized" in {plugin for plugin, _ in registry.kinds}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "answer", "text"),
    some(
        [
            (
                "lora_lightning_optimizers",
                "return 3",
                "lora_lightning_optimizers returned 3, which is no mapping of class name to import path",
            ),
            ("lora_lightning_optimizers", "return {'int': 'builtins:int'}", "which is no Optimizer class"),
            ("lora_lightning_callbacks", "raise ValueError('broken')", "broken"),
            (
                "lora_lightning_commands",
                "return {'fit': 'x'}",
                'verb "fit" of ll_wrong has a name that is taken, by core',
            ),
            ("lora_lightning_commands", "return ['x']", "which is no mapping of verb to module"),
            ("lora_lightning_commands", "return {'x': 3}", "which is no verb with the import path of a module"),
            (
                "lora_lightning_exporters",
                "return {'merged': 'x'}",
                'format "merged" of ll_wrong has a name that is taken, by',
            ),
            ("lora_lightning_exporters", "return ['x']", "which is no mapping of format to module"),
            ("lora_lightning_datamodules", "return {'int': 'builtins:int'}", "which is no LightningDataModule class"),
        ]
    ),
)
def test_a_wrong_answer_is_recorded_and_the_others_live(install, hook, answer, text):
    install("ll_wrong", answering(hook, answer))
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert text in one_line(registry.failed["ll_wrong"])
    assert set(registry.methods) >= OURS
    assert "SlowFast" in registry.classes


API_1 = {
    "lora_lightning_optimizers": ("return [MySGD]", SGD, '{"MySGD": "ll_old:MySGD"}'),
    "lora_lightning_callbacks": (
        "return (Mine,)",
        "from lightning.pytorch.callbacks import Callback\n\n        class Mine(Callback):\n            pass",
        '{"Mine": "ll_old:Mine"}',
    ),
    "lora_lightning_datamodules": (
        "return [Rows, More]",
        "from lightning.pytorch import LightningDataModule as Base\n\n        class Rows(Base):\n            pass\n"
        "\n        class More(Rows):\n            pass",
        '{"Rows": "ll_old:Rows", "More": "ll_old:More"}',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("hook", some(API_1))
def test_an_answer_of_api_1_is_refused_with_the_line_to_change(install, hook):
    """The plugin's methods stay; the line that the message gives is what makes it right."""
    answer, body, line = API_1[hook]
    install("ll_old", code("Old") + answering(hook, answer, body))
    registry = plugins.load()
    assert str(registry.failed["ll_old"]) == (
        f"ll_old: {hook} returned a list of classes, the form of API 1; answer {line}, and import nothing for it"
    )
    assert "Old" in registry.methods
    install("ll_new", answering(hook, f"return {line}", body).replace("ll_old", "ll_new"))
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert set(registry.failed) == {"ll_old"}
    assert {name for name, (plugin, _) in registry.classes.items() if plugin == "ll_new"} == set(
        re.findall(r'"(\w+)":', line)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "text"),
    some(
        [
            (
                "{'Mine': 'll_wrong.Mine'}",
                r"""returned 'Mine': 'll_wrong\.Mine'; an import path is written "module:Class"$""",
            ),
            ("{'Mine': 3}", "returned 'Mine': 3; an import path is written"),
            (
                "{'Short': 'll_wrong:Mine'}",
                'returned "Short": "ll_wrong:Mine"; a class goes by its own name, so write "ll_wrong:Short" or '
                '"Mine": "ll_wrong:Mine"$',
            ),
            ("[]", r"returned \[\], which is no mapping of class name to import path$"),
            ("[3]", r"returned \[3\], which is no mapping of class name to import path$"),
        ]
    ),
)
def test_an_import_path_that_is_none(install, answer, text):
    install("ll_wrong", answering("lora_lightning_callbacks", f"return {answer}"))
    registry = plugins.load()
    assert re.search(f"lora_lightning_callbacks {text}", str(registry.failed["ll_wrong"]))
    assert not {name for name, component in registry.components.items() if component.plugin == "ll_wrong"}


def test_a_class_that_cannot_be_imported_leaves_the_others_and_is_named_when_asked_for(install, capsys):
    body = f"{SGD}\n\n        class Other:\n            pass"
    answer = "return {'MySGD': 'll_part:MySGD', 'Gone': 'll_part.gone:Gone', 'Lost': 'll_part:Lost'}"
    install("ll_part", answering("lora_lightning_optimizers", answer, body))
    registry = plugins.load()
    assert not registry.failed
    plugins.load_classes(registry, BASES)
    assert "MySGD" in registry.classes
    assert set(registry.unusable) == {"Gone", "Lost"}
    assert "ll_part" in registry.failed
    text = registry.explain_unusable("Gone")
    assert text.startswith(
        "optimizer Gone (ll_part.gone.Gone) of plugin ll_part failed: ModuleNotFoundError: No module named 'll_part."
    )
    assert "has no attribute 'Lost'" in registry.explain_unusable("Lost")
    assert registry.explain_unusable("MySGD") == registry.explain_unusable("Nothing") == ""
    assert program.main(["show", "Gone"]) == 2
    assert "show: optimizer Gone cannot be imported: ModuleNotFoundError: " in capsys.readouterr().err
    assert program.main(["fit", "--config", "lora", "--model.optimizer", "Gone", "--print_config"]) == 2
    assert text.rstrip(".") in capsys.readouterr().err


def test_classes_are_imported_only_where_they_are_asked_for(install, tmp_path):
    (tmp_path / "ll_lazy_inner.py").write_text("raise RuntimeError('imported')\n")
    install("ll_lazy", answering("lora_lightning_optimizers", "return {'Lazy': 'll_lazy_inner:Lazy'}"))
    registry = plugins.load()
    assert not registry.failed
    assert program.main(["methods"]) == 0
    plugins.load_classes(registry, {"lora_lightning_callbacks": Callback})
    assert not registry.failed
    plugins.load_classes(registry, BASES)
    assert one_line(registry.failed["ll_lazy"]) == "RuntimeError: imported"


def test_hook_lora_lightning_tables(install):
    from lora_lightning.data.sources.builtin import builtin_table

    body = "def rows():\n            import datasets\n            return datasets.Dataset.from_dict({'x': [1, 2]})"
    install("ll_rows", answering("lora_lightning_tables", "return {'rows': 'll_rows:rows'}", body))
    install("ll_taken", answering("lora_lightning_tables", "return {'dates': 'll_taken:rows'}", body))
    install("ll_form", answering("lora_lightning_tables", "return {'form': 'll_form.rows'}", body))
    registry = plugins.load()
    assert builtin_table("builtin:rows", "")["x"][:] == [1, 2]
    assert 'table "dates" of ll_taken has a name that is taken, by ll_demo.dates:table' in str(
        registry.failed["ll_taken"]
    )
    assert "returned 'form': 'll_form.rows', which is no table with the import path of a function" in str(
        registry.failed["ll_form"]
    )


def test_an_import_that_core_does_not_have_is_explained(install):
    install("ll_newer", "from lora_lightning.not_yet import anything\nrequires_api = '>=9'")
    install("ll_name", "from lora_lightning.errors import NoSuchError\n")
    failed = plugins.load().failed
    expected = (
        r"It was written for another plugin interface than 2\.\d+, that of this core \(\S+\), or the name is misspelt$"
    )
    assert re.search(rf"^No module named 'lora_lightning\.not_yet'\. {expected}", str(failed["ll_newer"]))
    assert re.search(rf"^cannot import name 'NoSuchError' .*\. {expected}", str(failed["ll_name"]))


def test_two_optimizers_of_one_name(install):
    body = SGD.replace("MySGD", "SlowFast")
    install("ll_other", answering("lora_lightning_optimizers", "return {'SlowFast': 'll_other:SlowFast'}", body))
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert registry.classes["SlowFast"][0] == "ll_lorasc"
    text = str(registry.failed["ll_other"])
    assert "SlowFast of ll_other has a name that is taken, by plugin ll_lorasc; it must have another one" in text


TAKEN = {
    "optimizers": ("AdamW", "from torch.optim import SGD as Base", r"torch \(torch\.optim\)"),
    "callbacks": (
        "RankPruning",
        "from lightning.pytorch.callbacks import Timer as Base",
        r"lora_lightning \(lora_lightning\.callbacks\.rank_pruning\)",
    ),
    "datamodules": (
        "LabelledText",
        "from lightning.pytorch import LightningDataModule as Base",
        r"lora_lightning \(lora_lightning\.data\.labelled\)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(TAKEN))
def test_a_class_with_a_name_of_torch_lightning_or_core(install, capsys, kind):
    """The plugin fails and says why, at `methods` too, which imports nothing; the name keeps its meaning everywhere."""
    name, imported, owner = TAKEN[kind]
    hook, body = f"lora_lightning_{kind}", f"{imported}\n\n        class {name}(Base):\n            pass"
    install("ll_same", answering(hook, f"return {{'{name}': 'll_same:{name}'}}", body))
    registry = plugins.load()
    assert f"{hook}: {name} of ll_same has a name that is taken, by " in str(registry.failed["ll_same"])
    assert name not in registry.components
    plugins.load_classes(registry, BASES)
    assert re.search(f"by {owner}; it must have another one$", str(registry.failed["ll_same"]))
    assert name not in registry.classes
    assert named_classes(BASES[hook])[name].__module__.partition(".")[0] in ("torch", "lora_lightning")
    with plugins.names_kept(BASES.values()):
        assert resolve_class_path_by_name(BASES[hook], name).startswith(("torch.", "lora_lightning."))
    assert imported_class(f"ll_same.{name}") is sys.modules["ll_same"].__dict__[name]
    assert program.main(["methods"]) == 0
    assert f"failed: ll_same: PluginError: {hook}: {name} of ll_same has a name" in capsys.readouterr().out


def test_a_class_of_torchs_may_be_announced_again(install):
    install("ll_same", answering("lora_lightning_optimizers", "return {'AdamW': 'torch.optim:AdamW'}"))
    registry = plugins.load()
    plugins.load_classes(registry, BASES)
    assert not registry.failed
    assert registry.classes["AdamW"] == ("ll_same", torch.optim.AdamW)


def test_the_command_line_survives_an_optimizer_named_as_torchs(install, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = answering("lora_lightning_optimizers", "return {'AdamW': 'll_same:AdamW'}", SGD.replace("MySGD", "AdamW"))
    install("ll_same", source)
    words = ["fit", "--config", "lora", "--model.optimizer", "AdamW", "--print_config"]
    assert program.main(words) == 0
    assert "class_path: torch.optim.AdamW\n" in capsys.readouterr().out
    assert program.main([*words[:-2], "ll_same.AdamW", "--print_config"]) == 0
    assert "class_path: ll_same.AdamW\n" in capsys.readouterr().out
