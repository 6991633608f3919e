"""What an evaluation means, in words and Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prime_jax.evaluate.evaluation import PREDICTED, Evaluation
from prime_jax.evaluate.significance import DRAWS

SIGNIFICANT = 0.01
_LONGEST = 400  # characters of a text that are shown


class Example(NamedTuple):
    """One query, and what stood first in the ranking of each method.

    Attributes:
        id: Id of the query.
        won: Whether the prediction did better than the plain query.
        last_turn: The turn before, "" where there is none.
        query: The query.
        right: A right passage.
        returned: First passage of each method shown.
        correct: Whether that passage is a right one.
    """

    id: str
    won: bool
    last_turn: str
    query: str
    right: str
    returned: Mapping[str, str]
    correct: Mapping[str, bool]


def headline(evaluation: Evaluation) -> str:
    """Two sentences that say what the prediction is worth, honest in either direction."""
    ours, plain = evaluation.methods[PREDICTED], evaluation.methods["query"]
    first, before = ours.mean("P@1"), plain.mean("P@1")
    shares = f"{first:.1%} against {before:.1%} of {len(evaluation.test.query):,} questions"
    if before > 0:
        times = f"{first / before:.1f} times as often as searching with the query"
        start = f"Searching with the predicted embedding puts a right passage first {times}"
    else:
        start = "Searching with the predicted embedding is compared with a query that never puts one first"
    best = evaluation.best_baseline
    against = evaluation.significance[best]["MRR@10"]
    numbers = f"MRR@10 {ours.mean('MRR@10'):.3f} against {evaluation.methods[best].mean('MRR@10'):.3f}"
    if against.p >= SIGNIFICANT:
        verdict = f"Whether it is better than the best tuned baseline, {best}, is not certain"
    elif against.difference > 0:
        verdict = f"It is better than the best tuned baseline, {best}"
    else:
        verdict = f"It is worse than the best tuned baseline, {best}"
    return f"{start} ({shares}). {verdict} ({numbers}, {p_words(against.p)})."


def p_words(p: float) -> str:
    """A p-value as it is usually written."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def shorten(text: str) -> str:
    """A text for display: longer ones end in an ellipsis."""
    return text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " …"


def method_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of methods x metrics, from the values of report.json; chance is the last row."""
    metrics = list(values["methods"][PREDICTED])
    rows = [
        [name, *(f"{scores[metric]:.3f}" for metric in metrics)] for name, scores in values["methods"].items()
    ]
    return ["method", *metrics], [
        *rows,
        ["chance", *(_small(values["chance"][metric]) for metric in metrics)],
    ]


def _small(value: float) -> str:
    return "<0.001" if 0 < value < 0.001 else f"{value:.3f}"


def significance_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the prediction against each baseline."""
    head = [
        "predicted against",
        "metric",
        "difference",
        "95% interval",
        "relative",
        "p",
        "d_z",
        "wins / losses / ties",
    ]
    rows = [
        [
            name,
            metric,
            f"{c['difference']:+.3f}",
            f"{c['low']:+.3f} … {c['high']:+.3f}",
            "-" if c["relative"] is None else f"{c['relative']:+.0%}",
            _small(c["p"]),
            "-" if c["effect_size"] is None else f"{c['effect_size']:.2f}",
            f"{c['wins']} / {c['losses']} / {c['ties']}",
        ]
        for name, by_metric in values["significance"].items()
        for metric, c in by_metric.items()
    ]
    return head, rows


def novelty_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Head and rows of unseen and seen queries apart; None where all are of one kind."""
    found = values.get("novelty")
    if not found:
        return None
    metrics = list(found["methods"][PREDICTED]["unseen"])
    head = ["method", *(f"{kind} {metric}" for kind in ("unseen", "seen") for metric in metrics)]
    rows = []
    for name, by_kind in found["methods"].items():
        rows.append([name, *(f"{by_kind[kind][m]:.3f}" for kind in ("unseen", "seen") for m in metrics)])
    return head, rows


def novelty_words(values: Mapping[str, Any]) -> str:
    """One paragraph on what unseen means, and whether the prediction helps there."""
    found = values["novelty"]
    text = (
        f"Unseen are the {found['unseen']:,} questions none of whose right answers is one in train; the "
        f"other {found['seen']:,} measure memory as well. What carries over is the unseen part."
    )
    if against := found["significance"].get("query", {}).get("MRR@10"):
        text += (
            f" There the prediction differs from the plain query by {against['difference']:+.3f} MRR@10 "
            f"(95% interval {against['low']:+.3f} to {against['high']:+.3f}, {p_words(against['p'])})."
        )
    return text


def confidence_words(values: Mapping[str, Any]) -> list[str]:
    """Paragraphs on how good the confidence is, what it buys, and what the guard does."""
    found = values["confidence"]
    auc = (
        ""
        if found["auc"] is None
        else (
            f" A question with a right passage has the higher confidence in {found['auc']:.0%} of pairs with "
            "one without (50% is guessing)."
        )
    )
    own = " It was fitted on the very split measured here." if values["split"] == "dev" else ""
    half = found["coverage"].index(0.5)
    best, kept = found["selective"]["P@5"], found["confident"]["P@5"][half]
    alone = "" if kept is None else f"; the predictions of that half alone reach {kept:.3f}"
    told = [
        "Confidence is the probability of a right passage among the first five. Expected calibration error "
        f"{found['ece']:.3f}; a perfect confidence would show {found['ece_by_chance']:.3f} on so few "
        f"questions.{own}{auc}",
        f"If only the more confident half of the predictions is used and the query for the rest, P@5 is "
        f"{best[half]:.3f} (query alone {best[0]:.3f}, predictions alone {best[-1]:.3f}){alone}.",
    ]
    if guard := values["guard"]:
        told.append(
            f"Behind the guard, which goes back to {guard['fallback']} where the query is "
            f"unlike those of training, MRR@10 is {guard['MRR@10']:.3f} and P@5 {guard['P@5']:.3f}; on "
            f"average it lets {guard['trust']:.0%} of a prediction through."
        )
    return told


def ablation_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the model with a part taken away, beside the whole model and the plain query."""
    metrics = list(next(iter(values["ablation"].values())))
    rows = {name: values["methods"][name] for name in (PREDICTED, "query")} | values["ablation"]
    return ["part taken away", *metrics], [
        [{PREDICTED: "nothing", "query": "everything (plain query)"}.get(name, name)]
        + [f"{row[metric]:.3f}" for metric in metrics]
        for name, row in rows.items()
    ]


def gauge_words(values: Mapping[str, Any]) -> str:
    """One paragraph on hubs and collapse."""
    hubs, rank = values["gauges"]["hubness"], values["gauges"]["effective_rank"]
    spread = ", ".join(f"{name} {rank[name]:.0f}" for name in (PREDICTED, "query", "right answers"))
    return (
        "Hubness (skewness of how often a passage is among the first ten; large means that a few are "
        f"returned to everybody): predicted {hubs[PREDICTED]:.1f}, query {hubs['query']:.1f}. Effective rank "
        f"(in how many directions vectors spread): {spread}."
    )


def settings_table(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what tuning on dev chose for each baseline."""
    rows = []
    for name, chosen in values["settings"].items():
        setting = {key: value for key, value in chosen.items() if key not in ("settings_tried", "dev_MRR@10")}
        words = ", ".join(f"{key} = {value}" for key, value in setting.items()) or "nothing to tune"
        rows.append([name, words, str(chosen["settings_tried"]), f"{chosen['dev_MRR@10']:.3f}"])
    return ["baseline", "setting", "tried", "MRR@10 on dev"], rows


def measured(values: Mapping[str, Any]) -> str:
    """One paragraph: on what the numbers were measured and how."""
    own = " That is the split measured here, which favours the baselines." if values["split"] == "dev" else ""
    index = values.get("index", "exact")
    how = "exactly" if index == "exact" else f"with the index {index!r}"
    return (
        f"Split {values['split']}: {values['queries']:,} questions in {values['groups']:,} independent "
        f"groups, searched {how} among {values['corpus']:,} passages. Linear baselines were fitted on "
        f"train, and every baseline was tuned for MRR@10 on dev.{own} Intervals are 95% paired bootstrap "
        "intervals, p-values come from a paired permutation test; both take the questions of one "
        f"conversation or document as one unit ({DRAWS:,} draws, seed {values['seed']}). Chance is what a "
        "random order would score."
    )


def facts_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers come from, flat: run, data, versions."""
    flat: list[tuple[str, str]] = []

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit(f"{name}.{key}" if name else str(key), inner)
        else:
            flat.append((name, str(value)))

    visit("", {key: values[key] for key in ("data", "run", "versions") if key in values})
    return flat


def markdown(values: Mapping[str, Any], examples: Sequence[Example], note: str) -> str:
    """The report as Markdown."""
    parts = ["# Evaluation", values["headline"], _table(*method_table(values)), note, measured(values)]
    parts += [values.get("advice", "")]
    parts += ["## Significance", _table(*significance_table(values))]
    if apart := novelty_table(values):
        parts += ["## Unseen and seen answers", _table(*apart), novelty_words(values)]
    if values["confidence"]:
        parts += ["## Confidence", *confidence_words(values)]
    if values["ablation"]:
        parts += ["## What each part is worth", _table(*ablation_table(values))]
    parts += ["## Hubs and collapse", gauge_words(values)]
    parts += ["## Baselines as tuned", _table(*settings_table(values))]
    for title, won in (("## Wins over the plain query", True), ("## Losses to the plain query", False)):
        chosen = [example for example in examples if example.won == won]
        parts += [title] * bool(chosen) + [_example(example) for example in chosen]
    parts += ["## What was measured", _table(["what", "value"], [list(fact) for fact in facts_of(values)])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _example(example: Example) -> str:
    rows = [["last turn", example.last_turn]] if example.last_turn else []
    rows += [["query", example.query], ["a right passage", example.right]]
    rows += [
        [f"{name}, rank 1 ({'right' if example.correct[name] else 'wrong'})", text]
        for name, text in example.returned.items()
    ]
    return _table([f"`{example.id}`", ""], [[name, shorten(text)] for name, text in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;") if text != "---" else text
