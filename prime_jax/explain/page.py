"""explanations.html: one file with a card per question, readable on a phone and on paper."""

from collections.abc import Sequence
from html import escape

from prime_jax.evaluate.page import CSS
from prime_jax.explain.explanation import Explanation, KnownPair

BARS = 5
LONGEST = 280

_MORE = """
.bar { display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr 3.5rem; gap: .6rem; align-items: center;
  font-size: .88rem; margin: .15rem 0; }
.bar > span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.track { background: var(--tint); border-radius: .25rem; height: .8rem; overflow: hidden; }
.fill { display: block; background: #2f7ed8; height: 100%;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar > span:last-child { text-align: right; font-variant-numeric: tabular-nums; color: var(--soft); }
article h3 { font-size: 1.02rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.signal { margin: 0 0 .7rem; }
.facts { color: var(--soft); font-size: .86rem; margin: .5rem 0; }
@media (max-width: 40rem) { .bar { grid-template-columns: 7.5rem 1fr 3rem; } }
"""


def page(explanations: Sequence[Explanation], *, title: str, note: str) -> str:
    """The whole page; it needs nothing else.

    Args:
        explanations: What is shown, in order.
        title: Of the page.
        note: What was explained and how, under the title.
    """
    cards = "\n".join(map(_card, explanations))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{_MORE}</style></head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="note">{escape(note)}</p>\n{cards}\n</body></html>\n'
    )


def _card(found: Explanation) -> str:
    bars = "".join(
        f'<div class="bar"><span title="{escape(name)}">{escape(name)}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * weight:.1f}%"></span></span>'
        f"<span>{weight:.1%}</span></div>"
        for name, weight in list(found.routing_distribution.items())[:BARS]
    )
    rest = len(found.routing_distribution) - BARS
    if rest > 0:
        left = sum(list(found.routing_distribution.values())[BARS:])
        bars += f'<div class="facts">{rest} other subspaces: {left:.1%} together</div>'
    pairs = "".join(map(_pair, found.similar_known_pairs))
    return (
        f"<article><h3>{escape(_short(found.question) or 'a question')}</h3>"
        f'<p class="signal">{escape(found.actionable_signal)}</p>{bars}'
        f'<p class="facts">{escape(_facts(found))}</p><dl>{pairs}</dl></article>'
    )


def _facts(found: Explanation) -> str:
    moved = found.steering_influence.l2
    told = [f"steering moved the prediction by {moved:.2f}" if moved else "not steered"]
    if moved and found.steering_influence.kl is not None:
        told.append(f"and the routing by {found.steering_influence.kl:.2f} nats")
    if found.routing_entropy is not None:
        told.append(f"· entropy {found.routing_entropy:.2f} nats")
    if found.atypicality is not None and found.atypicality_rank is not None:
        higher = f"higher than for {found.atypicality_rank:.0%} of the known questions"
        told.append(f"· atypicality {found.atypicality:.2f}, {higher}")
    return " ".join(told)


def _pair(pair: KnownPair) -> str:
    return (
        f"<dt>known, similarity {pair.similarity:.2f}: {escape(_short(pair.question))}</dt>"
        f"<dd>{escape(_short(pair.source))}</dd>"
    )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else words[: LONGEST - 1].rstrip() + "…"
