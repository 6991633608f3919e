"""`prime-jax inspect`: what is inside a run, a checkpoint or a bundle, how large, and how it was trained."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prime_jax.config import load_stored_config
from prime_jax.errors import CheckpointError, ExportError, PredictorError
from prime_jax.files import user_path
from prime_jax.manifest import MANIFEST, SIGNATURE, read_manifest
from prime_jax.models import DEFAULT_KIND, AnyConfig
from prime_jax.models.bundle import KIND as BUNDLE
from prime_jax.models.bundle import read_config
from prime_jax.train import checkpoints


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    parser = ArgumentParser("prime-jax inspect", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=user_path, metavar="DIR", help="run folder, checkpoint, or bundle")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(argv)
    try:
        found = inspect(given.folder)
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax inspect: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def inspect(folder: Path) -> dict[str, Any]:
    """What a folder holds, from its manifests and config alone; no array is read and no file is hashed.

    Returns:
        `kind` (`run`, `checkpoint` or `bundle`); for a run `checkpoints`, each with step, metrics, bytes and
        whether it is the newest and the best, and the rest for the best one: `folder`, `facts` (versions,
        step, metrics, hashes), `model` (its config), `parameters`, `training` (its settings, None for a
        bundle), `items` (bytes and number of files of each part), `files` (bytes and SHA-256), `signed`.

    Raises:
        CheckpointError: If a manifest or config is missing or damaged.
        ExportError: If there is nothing of this library here.
    """
    if (folder / MANIFEST).is_file():
        return _one(folder)
    kept = checkpoints.list_checkpoints(folder) if folder.is_dir() else []
    if not kept:
        raise ExportError(f"{folder}: neither a bundle nor a checkpoint nor a run with checkpoints")
    best, newest = checkpoints.best(folder), kept[-1]
    rows = [
        {
            "step": one.step,
            "metrics": dict(one.facts["metrics"]),
            "bytes": sum(file["bytes"] for file in one.facts["files"].values()),
            "newest": one.step == newest.step,
            "best": one.step == best.step,
        }
        for one in kept
    ]
    return {**_one(best.folder), "kind": "run", "checkpoints": rows}


def _one(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    training: dict[str, Any] | None = None
    if manifest["kind"] == BUNDLE:
        model = read_config(folder)
    elif manifest["kind"] == checkpoints.KIND:
        config = load_stored_config(folder / checkpoints.CONFIG)
        model, training = config.model, config.train.model_dump()
    else:
        raise CheckpointError(f"{folder / MANIFEST}: describes a {manifest['kind']!r}")
    items: dict[str, dict[str, int]] = {}
    for name, file in manifest["files"].items():
        item = items.setdefault(name.split("/")[0], {"files": 0, "bytes": 0})
        item["files"] += 1
        item["bytes"] += file["bytes"]
    return {
        "kind": manifest["kind"],
        "folder": str(folder),
        "facts": {name: fact for name, fact in manifest.items() if name not in ("kind", "files", "sha256")},
        "manifest_sha256": manifest["sha256"],
        "model": model.model_dump(),
        "parameters": _parameters(model),
        "training": training,
        "items": items,
        "files": manifest["files"],
        "signed": (folder / SIGNATURE).is_file(),
    }


def _parameters(model: AnyConfig) -> int:
    from flax import nnx

    counted: list[int] = []
    nnx.eval_shape(lambda: counted.append(model.build(rngs=nnx.Rngs(0)).num_params()))  # no array is made
    return counted[0]


def _print(found: Mapping[str, Any]) -> None:
    console, facts, model = Console(markup=False), found["facts"], found["model"]
    if found["kind"] == "run":
        table = Table("step", "dev MRR@10", "size", "", title="checkpoints")
        for row in found["checkpoints"]:
            marks = [name for name in ("best", "newest") if row[name]]
            score = row["metrics"].get(checkpoints.SELECT_BY)
            shown = "-" if score is None else f"{score:.4f}"
            table.add_row(f"{row['step']:,}", shown, _size(row["bytes"]), ", ".join(marks))
        console.print(table)
    table = Table(show_header=False, title=Text(found["folder"]))
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("version", f"{facts['model_version']} (format {facts['format_version']})")
    table.add_row("model", f"{found['parameters']:,} parameters: {_shape(model)}")
    if training := found["training"]:
        table.add_row(
            "training",
            f"{training['num_epochs']} epochs, batch {training['batch_size']}, learning rate "
            f"{training['learning_rate']:g}, negatives {training['negatives']}, "
            f"seed {training['seed']}",
        )
    for name in ("step", "epoch", "encoder", "data_hash"):
        if name in facts:
            table.add_row(name.replace("_", " "), Text(f"{facts[name]}"))
    if isinstance(metrics := facts.get("metrics"), dict):
        table.add_row("validation", ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    if isinstance(versions := facts.get("versions"), dict):
        words = ", ".join(f"{name} {version}" for name, version in versions.items())
        table.add_row("made with", Text(words))
    table.add_row("manifest", f"SHA-256 {found['manifest_sha256']}")
    table.add_row(
        "signed", "yes; prime-jax verify --public-key KEY checks by whom" if found["signed"] else "no"
    )
    console.print(table)
    table = Table("part", "files", "size", "SHA-256")
    for name, item in found["items"].items():
        digest = found["files"].get(name, {}).get("sha256", "")
        table.add_row(Text(name), str(item["files"]), _size(item["bytes"]), digest[:16])
    console.print(table)
    console.print("These are the manifest's words; prime-jax verify checks every file.", style="dim")


def _shape(model: Mapping[str, Any]) -> str:
    """A model's config in a line."""
    ends = f"D {model['input_dim']}, E {model['output_dim']}"
    if model["kind"] == DEFAULT_KIND:
        return (
            f"{model['num_layers']} layers of {model['hidden_dim']}, {model['num_heads']} heads, {ends}, "
            f"N {model['max_context_length']}, residual {model['residual']}, attention "
            f"{model['context_attention']}"
        )
    if model["kind"] == "text":
        encoder = model["encoder"]
        return (
            f"text, {encoder['model_type']} of {encoder['num_hidden_layers']} layers of "
            f"{encoder['hidden_size']}, E {model['output_dim']}, reads {model['max_tokens']} tokens, "
            f"N {model['max_context_length']}, pooling {model['pooling']}"
        )
    if model["kind"] == "mix":
        linear = "no linear map" if model["linear"] == "none" else f"linear map of the {model['linear']}"
        return f"mix of query and up to {model['max_context_length']} turns, {linear}, {ends}"
    words = f"{model['kind']}, stacks of {model['num_layers']} blocks of {model['hidden_dim']}, {ends}"
    if "num_subspaces" in model:
        words += f", {model['num_subspaces']} subspaces, routing {model['routing']}"
    return f"{words}, residual {model['residual']}"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(main())
