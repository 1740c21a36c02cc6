"""Facts to edit into a small language model, and what it said before to prompts like theirs: two files for `compare`.

    python examples/made_up_facts.py stories260k [--facts 120]

The model is a folder of a small causal language model of children's stories. Written are, with the columns prompt and
completion:

    facts.jsonl        made-up facts, such as that Lily's favorite color was gray
    neighbours.jsonl   prompts of the same forms about others, each with the words that the model goes on with

`compare claims/rose_locality` teaches the first and measures the second before and after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Lucy", "Jane", "Tim", "Bob", "Sara", "Jack", "Amy")
FORMS = {
    "{name}'s favorite color was": ("gray", "white", "black", "gold", "brown"),
    "The name of {name}'s dog was": ("Rex", "King", "Star", "Ball", "Fish"),
    "Every morning {name} liked to eat": ("fish", "leaves", "soup", "rice", "grass"),
    "{name} lived with her family in a": ("boat", "cave", "truck", "castle", "tent"),
    "In the box {name} found a": ("star", "snake", "key", "stone", "hat"),
    "At the park {name} played with a": ("frog", "bear", "robot", "rock", "goat"),
    "On her birthday {name} got a": ("spoon", "horse", "drum", "net", "bell"),
    "{name} was afraid of the": ("moon", "bread", "rain", "sand", "wind"),
    "Before bed {name} always sang to the": ("clock", "shoe", "tree", "duck", "door"),
    "{name} wanted to be a": ("baker", "pilot", "clown", "nurse", "farmer"),
}
CONTINUED = 8
"""Tokens that each neighbour is continued by."""


def main() -> None:
    """Draw the facts, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--facts", type=int, default=120, help="at most 150 (120)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for the two files")
    args = parser.parse_args()
    prompts = list(itertools.product(FORMS, NAMES))
    random.Random(0).shuffle(prompts)
    draw = random.Random(1)
    facts = [(form.format(name=name), f" {draw.choice(FORMS[form])}") for form, name in prompts[: args.facts]]
    others = [form.format(name=name) for form, name in prompts[args.facts :]]
    others += [form.format(name=f"{name}'s friend") for form, name in prompts if "{name}'s" not in form]
    write(args.output / "facts.jsonl", facts)
    write(args.output / "neighbours.jsonl", list(zip(others, continued(args.model, others), strict=True)))


def continued(folder: Path, prompts: list[str]) -> list[str]:
    """What the model itself goes on with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUED, do_sample=False)
        text = tokenizer.decode(whole[0], skip_special_tokens=True)
        found.append(text[len(tokenizer.decode(ids[0], skip_special_tokens=True)) :])
    return found


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    """Prompts and completions, a line each."""
    path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows))
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
