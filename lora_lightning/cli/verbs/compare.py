"""Compare methods or settings: rates tuned for each, several seeds, intervals, and a report.

compare --config rose --methods LoRA,DoRA,RoseLoRA --seeds 3
compare --config my.yaml --vary model.method.rank=4,16,64 --vary model.method=LoRA,MoELoRA
compare arms.yaml | compare claims/rank_scaling
compare --resume runs/compare/003
compare claims/rank_scaling --resume runs/compare/003   # with the arms that the file has more
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.cli.main import VerbParser
from lora_lightning.errors import RunFolderError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from lora_lightning.cli.compare.plan import Plan

ROOT = Path("runs/compare")
NEEDED = ("optuna", "psutil", "scipy", "sklearn")
NO_OPTIONS = ("help", "methods", "vary", "listed", "folder", "resume", "join", "status")
"""Flags that a file of arms does not take as options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, how, and any flags of `fit` for all arms."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s [ARMS.yaml | --config NAME|PATH] [--methods A,B] [--vary SETTING=A,B] [flags of fit ...]"
    what = parser.add_argument_group("what is compared")
    what.add_argument("--methods", help='methods by name; "linear" is the head alone, "full" full fine-tuning')
    what.add_argument("--vary", action="append", default=[], metavar="SETTING=A,B,...", help="values of any setting")
    what.add_argument("--listed", action="store_true", help="take values of --vary side by side, not all combinations")
    how = parser.add_argument_group("how")
    how.add_argument("--seeds", type=int, default=3, metavar="N", help="final runs of an arm (3)")
    how.add_argument("--until", metavar="1%", help="add seeds until intervals are this narrow to each side")
    how.add_argument("--budget", metavar="400k|0.5%|same", help="solve ranks for this many numbers of adapters")
    how.add_argument("--time", action="store_true", help="equal measured training time instead of equal steps")
    how.add_argument("--no-tuning", action="store_true", help="take each arm's own rate")
    how.add_argument("--tune", action="append", default=[], metavar="SETTING=LOW..HIGH[:log][:int]", help="tune it too")
    how.add_argument("--searches", type=int, default=10, metavar="N", help="runs of an arm that search --tune (10)")
    how.add_argument(
        "--tuning-fraction", type=float, default=0.2, metavar="F", help="of training rows, to tune on (0.2)"
    )
    how.add_argument("--pruner", default="median", metavar="NAME", help="of tuning runs: median, halving or none")
    how.add_argument(
        "--also",
        metavar="CONFIG",
        help="a config whose data are measured, too, from before training to its end (forgetting)",
    )
    where = parser.add_argument_group("where, and how long")
    where.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (1)")
    where.add_argument("--minutes", type=float, metavar="M", help="most of them for a run")
    where.add_argument("--memory", type=float, metavar="GIB", help="most memory for a run")
    where.add_argument("--hours", type=float, metavar="H", help="begin no run after this time")
    where.add_argument("--storage", default="", metavar="URL", help="a database for Optuna; a journal file by default")
    where.add_argument("--folder", metavar="FOLDER", help="where a new comparison is kept (runs/compare/NNN)")
    where.add_argument("--resume", metavar="FOLDER", help="go on with a comparison, and take further arms of a file")
    where.add_argument("--join", metavar="FOLDER|STORAGE", help="take runs of a comparison beside other processes")
    where.add_argument("--status", metavar="FOLDER", help="say how far a comparison has come")
    where.add_argument("--recommend", action="store_true", help="say what to take, and write its config")
    parser.set_defaults(flags=[])


def run(args: argparse.Namespace) -> int:
    """Plan, run what is left, report."""
    check_installed()
    from lora_lightning.cli.compare.plan import Plan
    from lora_lightning.cli.compare.running import finish, run_all, status

    if args.status:
        print(status(Path(args.status)))
        return 0
    if args.join or args.resume:
        given = [word for word in args.flags if not word.startswith("-p=")]
        if given and (args.join or arms_file(given) is None):
            raise SettingsError(
                f"compare: {given[0]} beside --{'join' if args.join else 'resume'}; a comparison that has begun "
                "keeps its plan. Begin another one for other settings; a file of arms beside --resume adds those that "
                "it has more."
            )
        folder = joined(args.join) if args.join else Path(args.resume)
        plan = Plan.read(folder)
        if given:
            plan = planned(args, plan)
            plan.write(folder)
    else:
        plan = planned(args)
        folder = new_folder(ROOT) if args.folder is None else own_folder(Path(args.folder))
        plan.write(folder)
    print(f"comparison: {folder}", flush=True)
    stopped = run_all(folder, plan, args.jobs, args.hours)
    print(finish(folder, plan, args.recommend))
    if stopped:
        print(f"{stopped}; go on with python -m lora_lightning compare --resume {folder}")
        return 1
    return 0


def check_installed() -> None:
    """Raise `SettingsError` where the extra is missing."""
    import importlib.util

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f'compare needs {", ".join(missing)}; pip install "lora-lightning[compare]" installs what it takes.'
        )


def planned(args: argparse.Namespace, begun: Plan | None = None) -> Plan:
    """The plan of a comparison; one that has `begun` gets the arms that it lacks, and nothing else changes."""
    from lora_lightning.cli import command_line, former_names
    from lora_lightning.cli.compare import arms as arms_of
    from lora_lightning.cli.compare.plan import Plan, planned_arms
    from lora_lightning.cli.given_settings import given_settings
    from lora_lightning.methods import WrapperMethod
    from lora_lightning.plugins import registry

    known = list(registry().methods)
    words = list(args.flags)
    arms: list[arms_of.Arm] = []
    file = arms_file(words)
    if file is not None:
        read = arms_of.from_file(file, known)
        arms, words = read.arms, [*read.words, *words[2:]]
        args = with_options(args, read.options, file)
    methods = [name.strip() for name in args.methods.split(",") if name.strip()] if args.methods else []
    wrappers = [name for name, method in registry().methods.items() if issubclass(method, WrapperMethod)]
    wrapped = arms_of.around(wrappers, given_settings(command_line.read(words).rest, former_names.load))
    arms += arms_of.from_flags(methods, args.vary, args.listed, known, wrapped)
    arms_of.check(arms)
    options = checked_options(args)
    if begun is not None:
        check_same(begun, options)
    there = begun.arms if begun is not None else ()
    budget = begun.budget if begun is not None else args.budget
    found = planned_arms(words, arms, budget, lambda line: print(line, flush=True), there)
    if begun is not None:
        return dataclasses.replace(begun, arms=found)
    if not args.no_tuning and (fixed := next((one for one in found if not one.facts.tunable), None)) is not None:
        raise SettingsError(
            f"compare: rows of {fixed.facts.data} cannot be held out for tuning, since it is a stream or has no "
            "`hold_out`. Give each arm its rate in the config, and --no-tuning."
        )
    return Plan(arms=found, **options)


def checked_options(args: argparse.Namespace) -> dict[str, Any]:
    """What a plan holds beside its arms.

    Raises:
        SettingsError: a value outside its rule.
    """
    from lora_lightning.cli.compare.studies import PRUNERS, check_spaces

    if args.seeds < 1:
        raise SettingsError(f"--seeds is {args.seeds}; it must be at least 1, and 2 for intervals.")
    if args.pruner not in PRUNERS:
        raise SettingsError(f'--pruner is "{args.pruner}".{did_you_mean(args.pruner, PRUNERS)} {", ".join(PRUNERS)}.')
    if not 0 < args.tuning_fraction < 1:
        raise SettingsError(f"--tuning-fraction is {args.tuning_fraction}; it must lie between 0 and 1.")
    searched = dict(_space(text) for text in args.tune)
    check_spaces(searched)
    return {
        "seeds": args.seeds,
        "budget": args.budget,
        "tune_rate": not args.no_tuning,
        "fraction": args.tuning_fraction,
        "searched": searched,
        "searches": args.searches,
        "pruner": args.pruner,
        "same_time": args.time,
        "also": ("--config", args.also) if args.also else (),
        "minutes": args.minutes,
        "memory_gib": args.memory,
        "until": _fraction(args.until) if args.until else None,
        "storage": args.storage,
    }


def check_same(begun: Plan, options: Mapping[str, Any]) -> None:
    """Raise `SettingsError` for an option that is given, and is not that with which a comparison has begun."""
    parser = VerbParser("compare", allow_abbrev=False)
    add_arguments(parser)
    usual = checked_options(parser.parse_args([]))
    for name, value in options.items():
        if value not in (usual[name], before := getattr(begun, name)):
            raise SettingsError(
                f"compare --resume: {name} is {value}, and the comparison has begun with {before}, which all its arms "
                "need. Leave it, or begin another comparison."
            )


def arms_file(words: Sequence[str]) -> Path | None:
    """The first config, by path or name, where it is a file of arms."""
    from lora_lightning.cli.configs import find_config, has_arms

    if len(words) < 2 or words[0] not in ("--config", "-c"):
        return None
    path = Path(find_config(words[1]))
    return path if has_arms(path) else None


def with_options(args: argparse.Namespace, options: Mapping[str, Any], file: Path) -> argparse.Namespace:
    """Arguments with the options of a file of arms, where the command line does not give them itself.

    Raises:
        SettingsError: an option that there is not, or a value of another kind.
    """
    parser = VerbParser(f"{file}: options", allow_abbrev=False)
    add_arguments(parser)
    known = [action.dest for action in parser._actions if action.option_strings and action.dest not in NO_OPTIONS]
    words = []
    for name, value in options.items():
        dest = name.replace("-", "_")
        if dest not in known:
            raise SettingsError(
                f'{file}: options has "{name}".{did_you_mean(name, known)} It takes {", ".join(known)}.'
            )
        flag = f"--{dest.replace('_', '-')}"
        if value is not False:
            for one in value if isinstance(value, list) else [value]:
                words += [flag] if one is True else [flag, str(one)]
    read = parser.parse_args(words)
    own = {dest: value for dest, value in vars(args).items() if value != parser.get_default(dest)}
    return argparse.Namespace(**{**vars(args), **vars(read), **own})


def new_folder(root: Path) -> Path:
    """The next numbered folder, made."""
    from lora_lightning.cli.run_folder import last_number

    root.mkdir(parents=True, exist_ok=True)
    number = last_number(root)
    while True:
        number += 1
        folder = root / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def own_folder(folder: Path) -> Path:
    """A folder for a new comparison, made.

    Raises:
        RunFolderError: there is something in it already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f'--folder is "{folder}"; it is there already. --resume "{folder}" goes on with it.')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def joined(where: str) -> Path:
    """The folder of a comparison, by its own name, its journal, or the database that knows it."""
    from lora_lightning.cli.compare.studies import folder_in

    if "://" in where:
        return folder_in(where)
    path = Path(where)
    if not path.exists():
        raise RunFolderError(f'--join is "{where}"; there is no such folder or journal.')
    return path.parent if path.is_file() else path


def _space(text: str) -> tuple[str, str]:
    name, equals, space = text.partition("=")
    if not equals:
        raise SettingsError(f'--tune is "{text}"; write a setting and its space, such as model.method.alpha=8..64:log.')
    return name.removeprefix("--"), space


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise SettingsError(f'--until is "{text}"; write a half width such as 1% or 0.01.')
    return value
