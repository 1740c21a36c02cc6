from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lora_lightning import __main__ as program


def run_python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


def test_the_package_runs_as_a_program():
    result = run_python("-m", "lora_lightning", "fti")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(
        'error: no verb "fti". Did you mean "fit"? Verbs: fit, validate, test, predict, methods, '
    )
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="a pipe's end is another error there")
def test_a_reader_that_leaves_ends_it_in_silence():
    """What is printed at once, a table of rich's, a parser's help; the error of another pipe stays."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for words in (["--help"], ["methods"], ["cite", "--help"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "lora_lightning", *words]
        with os.fdopen(write, "w") as pipe:
            done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
        assert (done.returncode, done.stderr) == (program.BROKEN_PIPE, ""), words
    script = """
import lora_lightning.__main__ as program
def main(): raise BrokenPipeError("a worker")
program.main = main
program.program()
"""
    done = run_python("-c", script)
    assert done.returncode == 1
    assert "BrokenPipeError: a worker" in done.stderr


def test_ctrl_c_ends_it_with_a_line(monkeypatch, capsys):
    def main():
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "main", main)
    assert program.program() == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.skipif(os.name == "nt", reason="another signal there")
def test_a_thread_that_holds_the_finished_program_is_named():
    """As of a logger that uploads; Ctrl-C ends it, and threads of a pool are no such threads."""
    script = """
import threading
from concurrent.futures import ThreadPoolExecutor
import lora_lightning.__main__ as program
def main():
    ThreadPoolExecutor(1, thread_name_prefix="pool").submit(print).result()
    threading.Thread(target=threading.Event().wait, name="upload").start()
    return 0
program.main, program.HELD = main, 0.05
raise SystemExit(program.program())
"""
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        assert line.startswith("note: the work is done, and the program waits for 'upload': a thread that a plugin, ")
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_nothing_is_said_of_threads_that_hold_nothing(capsys):
    program.name_threads()
    assert capsys.readouterr().err == ""
