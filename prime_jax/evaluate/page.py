"""report.html: one file that needs nothing else, readable on a phone, on paper, in light and in dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prime_jax.evaluate.evaluation import PREDICTED
from prime_jax.evaluate.plots import JUDGED
from prime_jax.evaluate.words import (
    Example,
    ablation_table,
    confidence_words,
    facts_of,
    gauge_words,
    measured,
    method_table,
    novelty_table,
    novelty_words,
    settings_table,
    shorten,
    significance_table,
)

CSS = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5c6570; --page: #fff; --line: #dfe3e8;
  --tint: #eef4fc; --good: #1a7f45; --bad: #b3382c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a8b2; --page: #16191d;
  --line: #343a42; --tint: #1c2a3c; --good: #5fce8d; --bad: #f0877c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 .5rem; }
.headline { font-size: 1.35rem; line-height: 1.4; margin: 0 0 1.5rem; text-wrap: pretty; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p.note { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
table.words td, table.words th { text-align: left; }
table.words td:last-child { white-space: normal; overflow-wrap: anywhere; }
tr.ours td, tr.ours td:first-child { background: var(--tint); font-weight: 600; }
tr.chance td { color: var(--soft); }
tr.first td { border-top: 2px solid var(--line); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem;
  margin: 2rem 0; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .25rem; }
figure svg { width: 100%; height: auto; display: block; overflow: visible;
  font-family: system-ui, sans-serif; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; margin: 0 0 1rem;
  break-inside: avoid; }
dl { margin: 0; }
dt { color: var(--soft); font-size: .82rem; font-weight: 600; margin-top: .6rem; }
dt:first-child { margin-top: 0; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
.good { color: var(--good); }
.bad { color: var(--bad); }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .35rem .35rem; }
  .headline { font-size: 1.2rem; } }
@media print { body { padding: 0; max-width: none; font-size: 11pt; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { padding: .2rem .35rem; position: static; } tr { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; margin: 1rem 0; }
  h2 { margin-top: 1.5rem; break-after: avoid; } }
"""


def page(
    values: Mapping[str, Any], examples: Sequence[Example], pictures: Mapping[str, str], note: str
) -> str:
    """The whole page.

    Args:
        values: What report.json holds.
        examples: Wins and losses to show.
        pictures: Inline SVG by caption.
        note: Said where pictures are missing; "" when they are there.
    """
    wins = [example for example in examples if example.won]
    losses = [example for example in examples if not example.won]
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in pictures.items()
        if caption not in JUDGED
    )
    headline = (
        escape(values["headline"]).replace("p &lt; ", "p&nbsp;&lt;&nbsp;").replace("p = ", "p&nbsp;=&nbsp;")
    )
    body = [
        "<h1>Evaluation</h1>",
        f'<p class="headline">{headline}</p>',
        _table(*method_table(values), group=False),
        f'<p class="note">{escape(measured(values))}</p>',
        *([f"<p>{escape(values['advice'])}</p>"] if values.get("advice") else []),
        f'<div class="figures">{figures}</div>' if figures else f'<p class="note">{escape(note)}</p>',
        "<h2>Is the difference real?</h2>",
        _table(*significance_table(values), group=True),
        *_novelty(values),
        *_confidence(values, pictures),
        *_ablation(values),
        "<h2>Hubs and collapse</h2>",
        f'<p class="note">{escape(gauge_words(values))}</p>',
        "<h2>Baselines as tuned on dev</h2>",
        _table(*settings_table(values), group=False),
        *_section("Where the prediction wins over the plain query", wins),
        *_section("Where it loses to the plain query", losses),
        "<h2>What was measured</h2>",
        _table(["what", "value"], [list(fact) for fact in facts_of(values)], group=False, words=True),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Evaluation on {escape(values['split'])}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, group: bool, words: bool = False) -> str:
    """A table; with `group` a name that repeats is shown once and starts a block."""
    lines, previous = [], ""
    for row in rows:
        starts = row[0] != previous
        css = {PREDICTED: "ours", "chance": "chance"}.get(row[0], "first" if group and starts else "")
        cells = ["" if group and not starts else row[0], *row[1:]]
        lines.append(f'<tr class="{css}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        previous = row[0]
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    kind = ' class="words"' if words else ""
    table = f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _novelty(values: Mapping[str, Any]) -> list[str]:
    apart = novelty_table(values)
    if apart is None:
        return []
    note = f'<p class="note">{escape(novelty_words(values))}</p>'
    return ["<h2>Unseen and seen answers</h2>", _table(*apart, group=False), note]


def _confidence(values: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
    if not values["confidence"]:
        return []
    shown = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{pictures[caption]}</figure>"
        for caption in JUDGED
        if caption in pictures
    )
    notes = [f'<p class="note">{escape(words)}</p>' for words in confidence_words(values)]
    return ["<h2>Confidence</h2>", *notes, f'<div class="figures">{shown}</div>' if shown else ""]


def _ablation(values: Mapping[str, Any]) -> list[str]:
    if not values["ablation"]:
        return []
    return ["<h2>What each part is worth</h2>", _table(*ablation_table(values), group=False)]


def _section(title: str, examples: Sequence[Example]) -> list[str]:
    return [f"<h2>{title}</h2>", *map(_article, examples)] if examples else []


def _article(example: Example) -> str:
    items = [("last turn", example.last_turn)] if example.last_turn else []
    items += [("query", example.query), ("a right passage", example.right)]
    terms = [f"<dt>{name}</dt><dd>{escape(shorten(text))}</dd>" for name, text in items]
    for name, text in example.returned.items():
        verdict = (
            '<span class="good">right</span>' if example.correct[name] else '<span class="bad">wrong</span>'
        )
        terms.append(f"<dt>{escape(name)} returns first: {verdict}</dt><dd>{escape(shorten(text))}</dd>")
    return f"<article><dl>{''.join(terms)}</dl></article>"
