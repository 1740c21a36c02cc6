"""`report.html`: a comparison as one page that needs no network, in light and dark."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lora_lightning.cli.compare import pictures, results, table
from lora_lightning.cli.compare.outcomes import ArmOutcome
from lora_lightning.cli.compare.plan import Plan
from lora_lightning.cli.compare.studies import RATE, Done
from lora_lightning.version import __version__

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #1b1b1f; --soft: #5a5a64; --line: #d9d9e0; --band: #f4f4f7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16161a; --text: #e8e8ee; --soft: #a6a6b2; --line: #3a3a44; --band: #202027; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th { border-bottom-width: 2px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: 6px; }
figure svg { display: block; width: 100%; height: auto; color: var(--text); }
pre { background: var(--band); padding: .6rem .8rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; }
"""


def page(folder: Path, plan: Plan, found: Sequence[ArmOutcome]) -> str:
    """The whole page."""
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = ", ".join(one.name for one in found)
    parts = [
        f"<h1>Comparison {html.escape(folder.name)}: {html.escape(plan.metric)}</h1>",
        f'<p class="soft">{html.escape(names)}. {made}, lora_lightning {__version__}.</p>',
        *(f"<p>{html.escape(text)}</p>" for text in table.sentences(plan, found)),
        "<h2>Table</h2>",
        _table(table.columns(plan, found), table.rows(plan, found)),
        f'<p class="soft">{html.escape(_reading(plan))}</p>',
        "<h2>Pictures</h2>",
        _figures(plan, found),
        *_rows_apart(plan, found),
        *_tuning(plan, found),
        "<h2>To repeat an arm</h2>",
        *(_repeat(plan, one) for one in found),
        "<h2>Versions</h2>",
        f"<p>{html.escape(_versions())}</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Comparison {html.escape(folder.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _reading(plan: Plan) -> str:
    said = (
        "Differences are paired over validation rows and seeds; above 0 is better. Intervals hold for all arms "
        "together at 95 %, p values are corrected by Holm's rule. "
    )
    if plan.tune_rate:
        said += (
            f"Rates were tuned for each arm on {plan.fraction:.0%} of the training rows, which tuning runs did not "
            "train on, with a seed that no final run has; validation rows were not looked at. "
        )
    budget = "equal measured time of training" if plan.same_time else "equal steps"
    return f"{said}Arms had {budget}. Trained numbers count heads."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figures(plan: Plan, found: Sequence[ArmOutcome]) -> str:
    drawn = []
    for name in pictures.PANELS:
        if image := pictures.svg(name, plan, found):
            image = _own_ids(image, name)
            drawn.append(f'<figure role="img" aria-label="{html.escape(name)}">{image}</figure>')
    return f'<div class="figures">{"".join(drawn)}</div>'


def _own_ids(image: str, name: str) -> str:
    """Ids of one picture apart from those of the others on the page."""
    return image.replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')


def _rows_apart(plan: Plan, found: Sequence[ArmOutcome]) -> list[str]:
    """How many validation rows arms get right that the one beside does not, and the other way round."""
    if not table.is_fraction(plan.metric):
        return []
    by_name = {one.name: one for one in found}
    lines = []
    for one in found[1:]:
        both = [
            (a.rows[0], b.rows[0])
            for a in by_name[one.against].finals
            for b in one.finals
            if a.seed == b.seed and a.rows is not None and b.rows is not None and len(a.rows[0]) == len(b.rows[0])
        ]
        if both:
            gained = sum(float((b > a).sum()) for a, b in both) / len(both)
            lost = sum(float((b < a).sum()) for a, b in both) / len(both)
            lines.append([one.name, one.against, f"{gained:.1f}", f"{lost:.1f}", f"{len(both[0][0]):,}"])
    if not lines:
        return []
    heads = ["arm", "against", "better", "worse", "rows"]
    return ["<h2>Validation rows on which arms differ, a seed</h2>", _table(heads, lines)]


def _tuning(plan: Plan, found: Sequence[ArmOutcome]) -> list[str]:
    """All tuning runs, and why some were ended."""
    ended = [(one, done) for one in found for done in one.tuning]
    if not ended:
        return []
    heads = ["arm", "rate", *(name.rpartition(".")[2] for name in plan.searched), plan.metric, "how it ended"]
    rows = [
        [
            one.name,
            f"{done.job.values[RATE]:.3g}",
            *(f"{done.job.values[name]:.3g}" if name in done.job.values else "" for name in plan.searched),
            "-" if math.isnan(done.value) else table.number(done.value, plan.metric),
            _ending(done),
        ]
        for one, done in ended
    ]
    body = _table(heads, rows)
    return ["<h2>Tuning</h2>", f"<details><summary>{len(ended)} runs</summary>{body}</details>"]


def _ending(done: Done) -> str:
    return {"complete": "to the end", "pruned": "pruned", "failed": "failed"}[done.state] + (
        f": {done.reason}" if done.reason else ""
    )


def _repeat(plan: Plan, one: ArmOutcome) -> str:
    words = shlex.join(["python", "-m", "lora_lightning", "fit", *results.command(plan, one, 0)])
    run = one.best_run
    config = html.escape((run.folder / "config.yaml").read_text(encoding="utf-8")) if run else ""
    inside = f"<pre>{html.escape(words)}</pre>" + (f"<pre>{config}</pre>" if config else "")
    return f"<details><summary>{html.escape(one.name)}</summary>{inside}</details>"


def _versions() -> str:
    found = results.packages()
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)
