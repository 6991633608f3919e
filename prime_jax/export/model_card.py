"""MODEL_CARD.md of a bundle: what the model predicts, how to use it, where it comes from, how good it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from prime_jax._version import __version__
from prime_jax.export.interface import Interface


def model_card(
    interface: Interface,
    parameters: int,
    facts: Mapping[str, Any],
    parity: Mapping[str, Any],
    version: str,
    licence: str | None = None,
    *,
    memory_mapped: bool = False,
) -> str:
    """The card as Markdown.

    Args:
        interface: How the model is called.
        parameters: How many numbers were trained.
        facts: Where the model comes from (`write_bundle`).
        parity: What parity.json holds.
        version: Semantic version of the model.
        licence: Terms of the weights, where they were stated.
        memory_mapped: Whether the memory must be mapped by target_head.safetensors before it is searched.
    """
    words = interface.words(facts)
    parts = [
        "# Embedding predictor",
        f"Predicts the embedding of the passage that should be retrieved, from {words.given}. Search your "
        "index with the prediction instead of the query.",
        f"Version {version}, exported with prime-jax {__version__}; {parameters:,} parameters; "
        f"{words.settings}.",
        "## Inputs and output",
        _shapes(interface),
        words.explanation,
        words.encoder,
        _MEMORY if memory_mapped else "",
        _TEXT if "text" in parity else "",
        "## Use",
        words.usage,
        "## Training and evaluation",
        _origin(facts),
        "## Agreement with JAX",
        _agreement(words.golden, parity),
        _precisions(parity.get("precisions")),
        _company(interface.stranger[0], parity.get("batch_independence")),
        "## What it gives away about its training data",
        _leak(parity.get("leak_check"), trained=facts.get("trained", True)),
        "## Limits",
        f"{words.limits}\n"
        "- The prediction is as good as the training data is close to yours: measure it beside the plain "
        "query on your own data before relying on it.",
        "## Licence",
        f"Weights: {licence or 'not stated by who exported them'}. They may be bound by the terms of the "
        "data they were trained on and of the encoder that made the embeddings. The code in this bundle is "
        "Apache-2.0.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_MEMORY = (
    "**The memory must be mapped first.** This model was trained against targets that a trained head mapped; "
    "its predictions search passages that went through the same head: `y + y @ kernel`, scaled to unit norm, "
    "for every passage embedding `y`, with `kernel` from target_head.safetensors. Without it they are wrong."
)


_TEXT = (
    "**It was trained together with its encoders, which are here.** `encoder/x` embeds turns and queries, "
    "`encoder/y` the passages of the memory; embed the memory anew with it. `text.onnx` is the whole, from "
    "token ids (`input_ids` and `attention_mask`, `[B, N + 1, T]`: the turns, then the query) to the vector; "
    "the tokenizer is `encoder/x/tokenizer.json`."
)


def _shapes(interface: Interface) -> str:
    rows = []
    for tensor in (*interface.inputs, *interface.outputs):
        sizes = ", ".join(map(str, tensor.sizes))
        rows.append([f"`{tensor.name}`", f"{tensor.dtype} [B, {sizes}]", tensor.meaning])
    return table(["name", "type", "meaning"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _origin(facts: Mapping[str, Any]) -> str:
    named = {"step": "training steps", "epoch": "epochs", "data_hash": "training data (SHA-256)"}
    rows = [[what, f"{facts[name]}"] for name, what in named.items() if name in facts]
    parts = [table(["what", "value"], rows)] if rows else []
    if not facts.get("trained", True):
        parts.insert(0, "Nothing was trained; settings may have been chosen by the validation figures.")
    if metrics := facts.get("metrics"):
        scores = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        parts.append(f"Validation: {scores}.")
    if report := facts.get("report"):
        methods: Mapping[str, Mapping[str, float]] = report["methods"]
        columns = list(next(iter(methods.values())))
        measured = [
            [name, *(_with_interval(report, name, key, value) for key, value in scores.items())]
            for name, scores in methods.items()
        ]
        parts += [
            f"Measured on the {report['split']} split: {report['queries']:,} queries, "
            f"{report['corpus']:,} passages; 95% bootstrap intervals in brackets.",
            table(["method", *columns], measured),
        ]
        if headline := report.get("headline"):
            parts.append(str(headline))
    return "\n\n".join(parts) or "Nothing is recorded about the training of this model."


def _with_interval(report: Mapping[str, Any], method: str, metric: str, value: float) -> str:
    ends = report.get("intervals", {}).get(method, {}).get(metric)
    return f"{value:.4f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def _precisions(found: Mapping[str, Mapping[str, Any]] | None) -> str:
    """What the smaller ONNX files lose."""
    if not found:
        return ""
    some = next(iter(found.values()))
    rows = [
        [
            f"`model.{name}.onnx`",
            f"{one['cosine_mean']:.5f} / {one['cosine_min']:.5f}",
            f"{one['R@10']:.4f}",
            f"{one['loss']:.4f} [{one['loss_interval'][0]:.4f}, {one['loss_interval'][1]:.4f}]",
        ]
        for name, one in found.items()
    ]
    return (
        f"Smaller files, beside `model.onnx` on the {some['queries']:,} queries of the {some['split']} split "
        "(a negative loss is a gain; 95% bootstrap intervals over conversations):\n\n"
        + table(["file", "cosine mean / smallest", "R@10", "loss of R@10"], rows)
    )


def _company(stranger: str, found: Mapping[str, Any] | None) -> str:
    """What the rest of a batch changes."""
    if found is None:
        return ""
    worst = ", ".join(f"{value:.1e} in {name}" for name, value in found["max_abs_difference"].items())
    padding = ""
    if "padding" in found:
        changes = ", ".join(
            f"{one['max_abs_difference']:.1e} in {name} (cosine {one['min_cosine']:.6f})"
            for name, one in found["padding"].items()
        )
        padding = f" Padding behind them changes them by at most {changes}."
    return (
        f"A request is answered alike in any batch: alone, beside {stranger} and among "
        f"{found['rows']} rows its golden answers differ by at most {worst}.{padding}"
    )


def _leak(found: Mapping[str, Any] | None, *, trained: bool) -> str:
    """The membership-inference measurement and what it means (SEC-PRED-002)."""
    if not trained:
        return "Nothing: no data was trained on."
    if found is None or not found["measured"]:
        why = found["why"] if found else "the training data was not at hand when it was exported"
        return f"Not measured: {why}. Assume that who can query the model can learn about its training data."
    names = {
        "prediction": "closeness of the prediction",
        "query": "closeness of the plain query (knows no training)",
        "calibrated": "the first less the second",
    }
    rows = [
        [
            names[name],
            f"{one['auc']:.3f} [{one['auc_interval'][0]:.3f}, {one['auc_interval'][1]:.3f}]",
            "too few to say" if one["found_at_1_percent"] is None else f"{one['found_at_1_percent']:.1%}",
        ]
        for name, one in found["attacks"].items()
    ]
    calibrated = found["attacks"].get("calibrated", found["attacks"]["prediction"])
    low, high = calibrated["auc_interval"]
    if low > 0.5:
        meaning = (
            "The model has partly learned its training conversations by heart: who holds a conversation can "
            "tell better than by guessing whether it was trained on. Treat predictions on demand as you "
            "would treat the conversations, or train with more data, fewer epochs or more dropout."
        )
    else:
        meaning = (
            "This attack did not tell training conversations from others better than chance would; with so "
            f"many conversations the area may still be as large as {high:.3f}."
        )
        if found["attacks"]["prediction"]["auc_interval"][0] > 0.5:
            meaning += (
                " The attack without calibration does better than guessing: easier conversations may explain "
                "that, but memory is not excluded."
            )
        meaning += " Stronger attacks may exist."
    return (
        f"An attacker who holds a conversation asks whether it was in the training set: {found['members']:,} "
        f"conversations that were, {found['others']:,} of the {found['held_out']} split that were not, told "
        "apart by how close vectors come to what was really said next (0.5 is blind guessing; 95% bootstrap "
        "intervals over conversations):\n\n"
        + table(["attack", "AUC", "found at 1% false alarms"], rows)
        + "\n\n"
        + meaning
        + " The model gives out embeddings, not text; but they can be turned back into approximate text "
        "(Morris et al. 2023), so they protect nobody by themselves."
    )


def _agreement(golden: str, parity: Mapping[str, Any]) -> str:
    rows = []
    for name in ("onnxruntime", "torch"):
        found = parity[name]
        if not found["checked"]:
            rows.append([name, f"not checked: {found['why']}", ""])
            continue
        cosine = f"{found['min_cosine']:.9f}"
        each = found.get("outputs", {"embedding": found})
        for output, figures in each.items():
            shown = name if len(each) == 1 else f"{name}, `{output}`"
            difference = f"{figures['max_abs_difference']:.1e}"
            rows.append([shown, difference, cosine if output == "embedding" else ""])
    return f"Over {parity['rows']} golden requests (golden.safetensors), {golden}:\n\n" + table(
        ["runtime", "largest difference", "smallest cosine"], rows
    )
