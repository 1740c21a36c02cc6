"""Print a script that completes command lines in bash, zsh or fish."""

from __future__ import annotations

import argparse
import os

from lora_lightning.errors import SettingsError, did_you_mean

VARIABLE = "LORA_LIGHTNING_COMPLETE"
"""Environment variable by which a script hands over the line, up to the cursor."""

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
ZSH = r"""_lora_lightning() {
    if (( CURRENT < 4 )) || [[ "$words[2] $words[3]" != "-m lora_lightning" ]]; then
        _python "$@"
        return
    fi
    local -a found
    found=("${(@f)$(
        LORA_LIGHTNING_COMPLETE="${(j: :)words[1,CURRENT]}" "$words[1]" -m lora_lightning completion zsh 2> /dev/null
    )}")
    if [[ -n "$found" ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _lora_lightning python python3
"""
FISH = r"""function _lora_lightning
    set -lx LORA_LIGHTNING_COMPLETE (commandline -cp)
    set -l words (commandline -opc)
    $words[1] -m lora_lightning completion fish 2> /dev/null
end
complete -c python -c python3 -a '(_lora_lightning)' \
    -n 'string match -qr "^\s*\S+ +-m +lora_lightning " -- (commandline -cp)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument(
        "shell",
        metavar="|".join(SCRIPTS),
        help='for ~/.bashrc, and ~/.zshrc after compinit: eval "$(python -m lora_lightning completion SHELL)"; '
        "for ~/.config/fish/config.fish: python -m lora_lightning completion fish | source",
    )


def run(args: argparse.Namespace) -> int:
    """Print the script, or, asked by it, what can stand at the cursor.

    Raises:
        SettingsError: another shell.
    """
    if args.shell not in SCRIPTS:
        near = did_you_mean(args.shell, SCRIPTS)
        raise SettingsError(f'completion: there is no script for "{args.shell}".{near} Shells: {", ".join(SCRIPTS)}.')
    line = os.environ.get(VARIABLE)
    if line is None:
        print(SCRIPTS[args.shell], end="")
        return 0
    from lora_lightning.cli.shell.completion import candidates

    words = line.split()[3:] + ([""] if line.endswith(" ") else [])
    print("\n".join(candidates(words)))
    return 0
