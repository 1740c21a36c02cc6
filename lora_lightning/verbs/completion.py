"""Print a script that completes command lines in bash."""

from __future__ import annotations

import argparse
import os

from lora_lightning.errors import SettingsError

VARIABLE = "LORA_LIGHTNING_COMPLETE"
"""Environment variable by which the script hands over the line, up to the cursor."""

BASH = r"""_lora_lightning() {
    local line="${COMP_LINE:0:COMP_POINT}" words current
    COMPREPLY=()
    [[ "$line" =~ ^[^\ ]+\ +-m\ +lora_lightning\  ]] || return 0
    read -ra words <<< "$line"
    [[ "$line" == *" " ]] && current="" || current="${words[${#words[@]}-1]}"
    mapfile -t COMPREPLY < <(
        LORA_LIGHTNING_COMPLETE="$line" "${words[0]}" -m lora_lightning completion bash 2> /dev/null
    )
    if [[ "$current" == *:* && "$COMP_WORDBREAKS" == *:* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${current%:*}:"}")
    fi
}
complete -o bashdefault -o default -F _lora_lightning python python3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument(
        "shell", metavar="bash", help='for ~/.bashrc: eval "$(python -m lora_lightning completion bash)"'
    )


def run(args: argparse.Namespace) -> int:
    """Print the script, or, asked by it, what can stand at the cursor.

    Raises:
        SettingsError: another shell.
    """
    if args.shell != "bash":
        raise SettingsError(f'completion: there is no script for "{args.shell}"; nearest: bash.')
    line = os.environ.get(VARIABLE)
    if line is None:
        print(BASH, end="")
        return 0
    from lora_lightning.completion import candidates

    words = line.split()[3:] + ([""] if line.endswith(" ") else [])
    print("\n".join(candidates(words)))
    return 0
