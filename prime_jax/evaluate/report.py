"""The report of an evaluation: report.json, report.md, report.html, result.png and TREC run files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prime_jax import files
from prime_jax.errors import DataError, PredictorError
from prime_jax.evaluate.evaluation import PREDICTED, Evaluation
from prime_jax.evaluate.page import page
from prime_jax.evaluate.plots import figure_result, figures, found_within
from prime_jax.evaluate.reliability import COVERAGE
from prime_jax.evaluate.steering import steering_words
from prime_jax.evaluate.words import Example, headline, markdown

RUN_DEPTH = 20  # rows of each ranking in a run file
_SHOWN = 3  # wins, and as many losses, shown as examples


class Texts(NamedTuple):
    """What the rows of the evaluated split and the corpus say.

    Attributes:
        query_ids: Ids of the queries.
        queries: Their texts.
        last_turns: The turn before each query, "" where there is none.
        passage_ids: Ids of the corpus rows.
        passages: Their texts.
    """

    query_ids: Sequence[str]
    queries: Sequence[str]
    last_turns: Sequence[str]
    passage_ids: Sequence[str]
    passages: Sequence[str]


def report_values(evaluation: Evaluation, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in report.json.

    Args:
        evaluation: What was measured.
        facts: Where it comes from (run, data, versions), taken over as further keys.
    """
    methods = evaluation.methods
    return {
        "split": evaluation.split,
        "queries": len(evaluation.test.query),
        "corpus": evaluation.corpus,
        "headline": headline(evaluation) + steering_words(facts),
        "methods": {
            name: {metric: method.mean(metric) for metric in method.metrics}
            for name, method in methods.items()
        },
        "intervals": {
            name: {metric: list(ends) for metric, ends in method.intervals.items()}
            for name, method in methods.items()
        },
        "significance": {
            name: {metric: comparison._asdict() for metric, comparison in by_metric.items()}
            for name, by_metric in evaluation.significance.items()
        },
        "settings": {
            name: {**method.settings, "settings_tried": method.tried, "dev_MRR@10": method.dev_mrr}
            for name, method in methods.items()
            if name != PREDICTED
        },
        "best_baseline": evaluation.best_baseline,
        "novelty": _novelty(evaluation),
        "gauges": {name: dict(gauge) for name, gauge in evaluation.gauges.items()},
        "confidence": _confidence(evaluation),
        "guard": None if evaluation.guard is None else dict(evaluation.guard),
        "ablation": {part: dict(means) for part, means in evaluation.ablation.items()},
        "chance": dict(evaluation.chance),
        "found_within": {name: np.round(found_within(evaluation, name), 6).tolist() for name in methods},
        "groups": evaluation.groups,
        "seed": evaluation.seed,
        **facts,
    }


def _confidence(evaluation: Evaluation) -> dict[str, Any] | None:
    found = evaluation.reliability
    if found is None:
        return None
    return {
        **{name: getattr(found, name) for name in ("ece", "ece_by_chance", "brier", "auc")},
        "said": found.said.round(6).tolist(),
        "found": found.found.round(6).tolist(),
        "counts": found.counts.tolist(),
        "coverage": COVERAGE.round(2).tolist(),
        "selective": {name: values.round(6).tolist() for name, values in found.selective.items()},
        "confident": {
            name: [None if np.isnan(value) else round(float(value), 6) for value in values]
            for name, values in found.confident.items()
        },
    }


def _novelty(evaluation: Evaluation) -> dict[str, Any] | None:
    found = evaluation.novelty
    if found is None:
        return None
    return {
        "unseen": int(found.unseen.sum()),
        "seen": int((~found.unseen).sum()),
        "methods": {name: {kind: dict(row) for kind, row in by.items()} for name, by in found.means.items()},
        "significance": {
            name: {metric: comparison._asdict() for metric, comparison in by_metric.items()}
            for name, by_metric in found.significance.items()
        },
    }


def write_report(
    folder: Path, evaluation: Evaluation, texts: Texts, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write all files of the report and return what report.json holds.

    Without matplotlib the report is complete but for its pictures, and says so.

    Args:
        folder: Where to write; files of an earlier report are replaced one by one.
        evaluation: What was measured.
        texts: The texts behind the rows.
        facts: Where the numbers come from; JSON values.

    Raises:
        DataError: If an id holds white space, which a TREC file cannot express.
    """
    write_trec(folder, evaluation, texts)
    values = report_values(evaluation, facts)
    examples = choose_examples(evaluation, texts)
    try:
        pictures, note = figures(evaluation), ""
        figure_result(evaluation, folder / "result.png")
    except PredictorError as missing:
        pictures, note = {}, f"No pictures: {missing}"
    files.write_text(folder / "report.md", markdown(values, examples, note))
    files.write_text(folder / "report.html", page(values, examples, pictures, note))
    files.write_json(folder / "report.json", values)
    return values


def write_trec(folder: Path, evaluation: Evaluation, texts: Texts) -> None:
    """Write `run.<method>.trec` for every method and `qrels.trec`, as trec_eval reads them.

    A run holds the first `RUN_DEPTH` of each ranking.

    Raises:
        DataError: If an id holds white space.
    """
    for name in (*texts.query_ids, *texts.passage_ids):
        if not name or name.split() != [name]:
            raise DataError(f"the id {name!r} holds white space, which separates the columns of TREC files")
    for method, ranking in evaluation.methods.items():
        lines = [
            f"{query} Q0 {texts.passage_ids[row]} {rank} {score:.9g} {method}\n"
            for query, rows, scores in zip(
                texts.query_ids, ranking.indices.tolist(), ranking.scores.tolist(), strict=True
            )
            for rank, (row, score) in enumerate(zip(rows[:RUN_DEPTH], scores, strict=False), start=1)
            if row >= 0
        ]
        files.write_text(folder / f"run.{method}.trec", "".join(lines))
    qrels = [
        f"{query} 0 {texts.passage_ids[row]} 1\n"
        for query, rows in zip(texts.query_ids, evaluation.test.positives, strict=True)
        for row in rows.tolist()
    ]
    files.write_text(folder / "qrels.trec", "".join(qrels))


def choose_examples(evaluation: Evaluation, texts: Texts) -> list[Example]:
    """The clearest wins and losses against the plain query, drawn at random among equals."""
    ours = evaluation.methods[PREDICTED].metrics["MRR@10"]
    difference = ours - evaluation.methods["query"].metrics["MRR@10"]
    shuffled = np.random.default_rng(evaluation.seed).permutation(len(difference))
    order = shuffled[np.argsort(-difference[shuffled], kind="stable")]
    wins = [row for row in order[:_SHOWN] if difference[row] > 0]
    losses = [row for row in order[::-1][:_SHOWN] if difference[row] < 0]
    shown = list(dict.fromkeys([PREDICTED, "query", evaluation.best_baseline]))

    def text(row: int) -> str:
        return texts.passages[row] if row >= 0 else "(nothing)"

    return [
        Example(
            id=texts.query_ids[query],
            won=bool(difference[query] > 0),
            last_turn=texts.last_turns[query],
            query=texts.queries[query],
            right=text(int(evaluation.test.positives[query][0])),
            returned={name: text(int(evaluation.methods[name].indices[query, 0])) for name in shown},
            correct={name: bool(evaluation.methods[name].metrics["P@1"][query]) for name in shown},
        )
        for query in [*wins, *losses]
    ]
