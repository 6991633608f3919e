"""What a bundle can be made of besides a run: weights of PyTorch, an adapter, or nothing that was trained."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from prime_jax.errors import ExportError

TAKES = {
    "run": ("data", "store", "encoder"),
    "torch": (),
    "untrained": ("max_turns", "query_prefix"),
    "general": (),
    "from_adapter": ("encoder",),
    "baseline": ("data", "store", "encoder", "max_turns", "query_prefix", "passage_prefix"),
}
"""By the option that names a source: those that say how it is read."""


def source_of(given: Namespace) -> str:
    """Which of `TAKES` is given."""
    return next(name for name in TAKES if getattr(given, name) is not None)


def check_source(given: Namespace) -> None:
    """Refuse options that the source does not take, or lacks.

    Raises:
        ExportError: Naming the option.
    """
    source = source_of(given)
    if source != "run" and given.precision != "fp32":
        raise ExportError("--precision goes with --run and its data; weights alone cannot be judged")
    for name in sorted({name for names in TAKES.values() for name in names}):
        if getattr(given, name) is not None and name not in TAKES[source]:
            raise ExportError(f"--{_option(name)} does not go with --{_option(source)}")
    if source == "baseline" and given.data is None:
        raise ExportError("--baseline is tuned on dev: name the data folder with --data")
    if given.like is not None and source != "torch":
        raise ExportError("--like goes with --torch; a run knows its own config")
    if given.adapter is None:
        for name in ("attribution", "share"):
            if getattr(given, name) is not None:
                raise ExportError(f"--{name} goes with --adapter, whose file says it")
        return
    if given.share is not None and not 0 < given.share <= 1:
        raise ExportError(f"--share must be above 0 and at most 1, not {given.share}")
    if source != "run" or given.adapter.suffix != ".safetensors":
        raise ExportError("--adapter FILE.safetensors goes with --run")
    if given.adapter.resolve().is_relative_to(given.out):
        raise ExportError(f"{given.adapter}: lies in the bundle, which lists its files; name another place")


def _option(name: str) -> str:
    return name.replace("_", "-")


def write_without_run(given: Namespace, options: Any) -> dict[str, Any]:
    """Write the bundle of any source but a run; gives what parity.json holds."""
    source = source_of(given)
    if source == "torch":
        return _from_torch(given, options)
    if source == "baseline":
        return _baseline(given, options)
    return _untrained(given, options) if source == "untrained" else _from_adapter(given, options)


def _from_torch(given: Namespace, options: Any) -> dict[str, Any]:
    """A bundle of weights trained in PyTorch; what inputs mean comes from the bundle they started from."""
    from prime_jax.export.bundle import CONFIG_FACTS, write_bundle
    from prime_jax.export.from_torch import from_torch
    from prime_jax.files import read_json
    from prime_jax.models.bundle import load_bundle

    config, facts, head = None, {}, None
    if given.like is not None:
        head = load_bundle(given.like).target_head
        config = given.like / "config.json"
        facts = {name: fact for name, fact in read_json(config).items() if name in CONFIG_FACTS}
    model = from_torch(given.torch, config)
    return write_bundle(model, given.out, facts=facts, target_head=head, options=options, source=given.like)


def _untrained(given: Namespace, options: Any) -> dict[str, Any]:
    """A bundle of what needs no training."""
    from prime_jax.predict.untrained import untrained

    of: dict[str, Any] = {"encoder": given.untrained}
    if given.untrained.removeprefix("-").isdecimal():
        of = {"dim": int(given.untrained)}
    said = {"max_turns": given.max_turns, "query_prefix": given.query_prefix}
    predictor = untrained(**of, **{name: value for name, value in said.items() if value is not None})
    return _of_memory(predictor, given.out, options, trained=False)


def _from_adapter(given: Namespace, options: Any) -> dict[str, Any]:
    """A bundle of an encoder with an adapter added, or with that of the package."""
    from prime_jax.predict.adapter import general, load_adapter

    named = given.encoder or "minilm"
    predictor = general() if given.general else load_adapter(given.from_adapter, named)
    return _of_memory(predictor, given.out, options, trained=True)


def _of_memory(predictor: Any, out: Path, options: Any, *, trained: bool) -> dict[str, Any]:
    """A bundle of a predictor in memory."""
    from prime_jax.export.bundle import FACTS, write_bundle

    info = predictor.info()
    facts = {name: info[name] for name in FACTS if name in info} | {"trained": trained}
    source = None if "source" not in info else Path(info["source"])
    return write_bundle(predictor.model, out, facts=facts, options=options, source=source)


def _baseline(given: Namespace, options: Any) -> dict[str, Any]:
    """A bundle of a baseline, tuned on dev."""
    from prime_jax.evaluate.untrained import compare_untrained
    from prime_jax.export.tune import source_of_data, write_candidate

    source, turns = source_of_data(given)
    compared = compare_untrained(source, max_turns=turns, only=[given.baseline])
    return write_candidate(compared.named(given.baseline), compared, given.out, options)
