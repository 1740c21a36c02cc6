"""The scripts in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from lora_lightning.cli.main import main


def test_another_shell_is_an_error(capsys):
    assert main(["completion", "fisch"]) == 2
    expected = 'error: completion: there is no script for "fisch". Did you mean "fish"? Shells: bash, zsh, fish.\n'
    assert capsys.readouterr().err == expected


def in_shell(shell, tmp_path, capsys, code):
    """What `code` prints in a shell that has read the script."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    plain = {"zsh": ["-f"], "fish": ["--no-config"], "bash": []}[shell]
    words = [shell, *plain, "-c", code.replace("SCRIPT", str(script))]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert done.stderr == ""
    return done.stdout.split()


def test_zsh_completes(capsys, tmp_path):
    """Its completion system binds the function; what is not ours goes to its own one for Python."""
    code = f"""
autoload -Uz compinit; compinit -u -D
source SCRIPT
print $_comps[python] $_comps[python3]
compadd() {{ print -l -- "$@"; }}; _python() {{ print system; }}; _files() {{ print files; }}
words=({sys.executable} -m lora_lightning val); CURRENT=4; _lora_lightning
words=({sys.executable} -m lora_lightning show Rose); CURRENT=5; _lora_lightning
words=({sys.executable} -m lora_lightning fit here/); CURRENT=5; _lora_lightning
words=(python x); CURRENT=2; _lora_lightning
"""
    found = in_shell("zsh", tmp_path, capsys, code)
    assert found == ["_lora_lightning", "_lora_lightning", "--", "validate", "--", "RoseLoRA", "files", "system"]


def test_fish_completes(capsys, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    code = f"""
cd {tmp_path}
source SCRIPT
for line in "val" "fit -p no:ll_ro" "show Rose"
    complete -C "./python -m lora_lightning $line"
end
complete -C "./python -m venv val"
"""
    assert in_shell("fish", tmp_path, capsys, code) == ["validate", "no:ll_rose", "RoseLoRA"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_and_imports_nothing_heavy(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    ask = """
ask() { COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; _lora_lightning; printf '%s\\n' "${COMPREPLY[@]}" "--"; }
"""
    lines = [
        f"{sys.executable} -m lora_lightning val",
        f"{sys.executable} -m lora_lightning fit -p no:ll_ro",
        "python x ",
    ]
    calls = "\n".join(f'ask "{line}"' for line in lines)
    result = subprocess.run(
        ["bash", "-c", f"source {script}\n{ask}\n{calls}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["validate", "--", "ll_rose", "--", "--"]
    loaded = (
        "import sys; from lora_lightning.cli.shell.completion import candidates\n"
        "for words in (['fit', '--t'], ['fit', '--data', ''], ['fit', '--config', 'lora', '--trainer.']):\n"
        "    assert candidates(words), words\n"
        "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", loaded], timeout=120, check=True)
