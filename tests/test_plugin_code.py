"""Whatever a plugin's code raises, prints or takes of time is noted; tests/test_plugins.py has the plugins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from lora_lightning import plugin_code as module
from lora_lightning.errors import PluginError
from lora_lightning.plugin_code import check_api, explained, imported, plugin_code


def test_code_that_comes_to_its_end_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with plugin_code() as ran:
        result = 1 + 1
    assert (result, ran.error, ran.printed) == (2, None, "")
    assert ran.seconds >= 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration()]
)
def test_what_is_raised_is_noted(error: BaseException) -> None:
    with plugin_code() as ran:
        raise error
    assert ran.error is error


def test_what_is_printed_is_noted_once_and_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with plugin_code() as outer:
        print("first")
        with plugin_code() as inner:
            print("second")
        kept = sys.stdout
    assert (outer.printed, inner.printed) == ("first\nsecond\n", "")
    assert sys.stdout is before
    assert capsys.readouterr() == ("", "first\nsecond\n")
    print("third", file=kept)
    assert capsys.readouterr() == ("third\n", "")
    assert kept.isatty() == before.isatty()


def test_what_other_processes_and_compiled_code_print_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with plugin_code() as ran:
        os.write(1, b"bytes\n")
        subprocess.run([sys.executable, "-c", "print('a process')"], check=True, timeout=60)
        with plugin_code():
            os.write(1, b"inside\n")
    print("after", flush=True)
    os.write(1, b"end\n")
    assert (ran.error, ran.printed) == (None, "")
    assert capfd.readouterr() == ("before\nafter\nend\n", "bytes\na process\ninside\n")


def test_a_process_without_standard_output_loads_plugins() -> None:
    code = (
        "import os; os.close(1); import sys\nfrom lora_lightning import plugins\n"
        "sys.stdout = None; sys.exit('LoRA' not in plugins.load().methods)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_time_is_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 9.5])
    monkeypatch.setattr(module, "clock", lambda: next(times))
    with plugin_code() as ran:
        pass
    assert ran.seconds == 8.5


def test_ctrl_c_passes_and_the_handler_is_the_one_before() -> None:
    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt(f"of handler {number}")

    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="of handler 2"), plugin_code():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
        with plugin_code() as ran:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the plugin's own wish stays
        assert ran.error is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with plugin_code() as ran:
            signal.raise_signal(signal.SIGINT)
        assert ran.error is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_than_the_main_one_may_load_plugins() -> None:
    found = []

    def run() -> None:
        with plugin_code() as ran:
            raise KeyboardInterrupt
        found.append(ran.error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert type(found[0]) is KeyboardInterrupt


@pytest.mark.parametrize(
    ("required", "text"),
    [
        (None, ""),
        (">=2,<3", ""),
        (
            ">=3",
            r'^requires_api is ">=3", and the plugin interface of this core \(\S+\) is 2\.\d+; it needs another vers',
        ),
        ("newest", r'^requires_api is "newest"; it must be a range of versions such as ">=2,<3"$'),
    ],
)
def test_the_interface_that_a_plugin_requires(required: str | None, text: str) -> None:
    if not text:
        check_api(required)
        return
    with pytest.raises(PluginError, match=text):
        check_api(required)


def test_an_import_that_core_lacks_is_explained_and_another_is_itself() -> None:
    missing = ModuleNotFoundError("No module named 'lora_lightning.new'", name="lora_lightning.new")
    told = explained("ll_x", missing)
    assert "It was written for another plugin interface than 2." in str(told)
    assert told.__cause__ is missing
    other = ModuleNotFoundError("No module named 'numba'", name="numba")
    assert explained("ll_x", other) is other


def test_a_module_is_imported_or_its_error_is_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert imported("math").pi > 3
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        imported("no_such_module_anywhere")
    (tmp_path / "ends_at_import.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(PluginError, match=r"^importing ends_at_import raises SystemExit\(3\)$"):
        imported("ends_at_import")


CHANGES = {
    "directory": (lambda: os.chdir("/"), ["changes the working directory"]),
    "arguments": (lambda: sys.argv.clear(), ["changes sys.argv"]),
    "warnings": (lambda: warnings.simplefilter("error"), ["turns warnings into errors"]),
    "a filter": (lambda: warnings.simplefilter("ignore", FutureWarning), []),
    "a daemon": (lambda: threading.Thread(target=time.sleep, args=(0.01,), daemon=True).start(), []),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_it_changes_of_the_process_is_put_back_and_noted(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "fit"])
    change, noted = CHANGES[case]
    with warnings.catch_warnings():
        warnings.resetwarnings()  # the tests have errors of their own
        with plugin_code() as ran:
            change()
        assert [entry for entry in warnings.filters if entry[0] == "error" and entry[2] is Warning] == []
    assert (ran.error, ran.changed) == (None, noted)
    assert (Path.cwd(), sys.argv) == (tmp_path, ["program", "fit"])


def test_a_thread_that_outlives_the_program_is_noted() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    with plugin_code() as ran:
        thread.start()
    end.set()
    thread.join()
    assert ran.changed == ["starts a thread that is no daemon, so that the program cannot end"]


@pytest.mark.parametrize("name", ["_exit", "abort"])
def test_what_would_end_the_program_is_refused_by_name(name: str) -> None:
    before = getattr(os, name)
    with plugin_code() as ran:
        before_or_not = getattr(os, name)
        before_or_not(3)
    assert str(ran.error) == f"it calls os.{name}, which would end the program"
    assert getattr(os, name) is before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no such call there")
def test_a_process_that_it_forks_may_end() -> None:
    code = (
        "import os\nfrom lora_lightning.plugin_code import plugin_code\n"
        "with plugin_code() as ran:\n    child = os.fork()\n    if not child: os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ran.error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "7 None\n"
