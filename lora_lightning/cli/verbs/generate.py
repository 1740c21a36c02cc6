"""Answer a file of prompts; several adapters give a column each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.cli.answers.sampling import Sampling, add_model_arguments, add_sampling_arguments, sampling_of
from lora_lightning.errors import DataError, SettingsError

if TYPE_CHECKING:
    from lora_lightning.cli.answers.prompts import Row
    from lora_lightning.cli.answers.voices import Voices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Who answers, what, and where to."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="RUN|ADAPTER",
        help="run folders, adapter folders, folders of peft, hub ids; or the base model's name",
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="prompts: .jsonl, .csv, .txt, ... or a data set")
    parser.add_argument("--output", required=True, metavar="FILE", type=Path, help="ending in .jsonl or .csv")
    parser.add_argument("--column", metavar="NAME", help="column of the prompts or conversations")
    parser.add_argument("--system", default="", metavar="TEXT", help="system text of conversations without one")
    parser.add_argument(
        "--plain", action="store_true", help="go on with texts as they are, without chat template or format"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at a time; 8")
    parser.add_argument("--with_base", action="store_true", help="a column of the base model's answers, too")
    parser.add_argument("--unmerged", action="store_true", help="leave adapters beside the weights")
    add_sampling_arguments(parser)
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read, answer, write at once.

    Raises:
        SettingsError: a batch size below 1, or another kind of output.
        DataError: prompts that cannot be read.
        RunFolderError: the output cannot be written.
    """
    sampling = sampling_of(args)
    if not (sampling.greedy or any(v is not None for v in (sampling.temperature, sampling.top_p, sampling.top_k))):
        sampling = sampling.replaced("greedy", "true")  # as predict
    if args.batch_size < 1:
        raise SettingsError(f"--batch_size is {args.batch_size}; it must be at least 1.")
    if args.output.suffix not in (".csv", ".jsonl"):
        raise SettingsError(f'--output is "{args.output}"; it must end in .csv or .jsonl.')

    from lora_lightning.cli.answers.prompts import read_rows
    from lora_lightning.cli.answers.voices import BASE, Voices
    from lora_lightning.data.media.parts import named
    from lora_lightning.training.predictions import write_rows

    rows = read_rows(args.input)
    voices = Voices(args.sources, args.pretrained, args.dtype, args.device)
    labels = [label for label in voices.voices if label != BASE]
    if args.with_base or not labels:
        labels.append(BASE)
    answers = {}
    for label in labels:
        voices.use(label)
        if label != BASE:
            print(f"{label}: {'unmerged' if args.unmerged else voices.merge_all()}", flush=True)
        answers[label] = answered(voices, rows, sampling, args)
    columns = {label: "prediction" if len(labels) == 1 else f"prediction_{label}" for label in labels}
    taken = [name for name in columns.values() if name in rows[0].values]
    if taken:
        raise DataError(f'--input has a column "{taken[0]}", which the answers go to; rename it.')
    written = []
    for number, row in enumerate(rows):
        own = {name: answers[label][number] for label, name in columns.items()}
        written.append({**named(row.values), "index": number, **own})
    write_rows(args.output, written)
    print(f"predictions: {args.output} ({len(written)} rows)")
    return 0


def answered(voices: Voices, rows: list[Row], sampling: Sampling, args: argparse.Namespace) -> list[str]:
    """The answer of the voice that speaks to each row."""
    import torch

    from lora_lightning.cli.answers.asking import inputs_of
    from lora_lightning.cli.answers.prompts import Prompter, batches
    from lora_lightning.models.generation import continued_batch, end_text

    voice, seq2seq = voices.current, voices.is_seq2seq
    room = voices.room(sampling.max_new_tokens)
    prompter = Prompter(voice, args.column, args.system, args.plain, seq2seq)
    prompts = [
        prompter.prompt(row.values, f"{args.input}: row {number}", room, row.folder) for number, row in enumerate(rows)
    ]
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    last = end_text(voice.tokenizer) if prompter.in_turns else ""
    config = sampling.config(voices.model, voice.tokenizer, last)
    found: dict[int, str] = {}
    for batch in batches([len(prompt.ids) for prompt in prompts], args.batch_size):
        inputs = inputs_of(voice, [prompts[number] for number in batch], voices.model)
        found |= dict(zip(batch, continued_batch(voices.model, voice.tokenizer, inputs, last, config), strict=True))
    return [found[number] for number in range(len(rows))]
