"""`python -m prime_jax.export`: write a bundle for ONNX Runtime, PyTorch and JAX."""

import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prime_jax.errors import ExportError, PredictorError
from prime_jax.evaluate import UNTRAINED
from prime_jax.export.tune import add_source_options
from prime_jax.export.without_run import check_source, write_without_run
from prime_jax.files import user_path
from prime_jax.locks import exclusive

PASSWORD = "PRIME_SIGN_PASSWORD"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    given = _parser().parse_args(argv)
    given.out = given.out.resolve()  # "." has no name to write beside
    try:
        _check(given)
        with exclusive(given.out, "a bundle", lock=given.out.with_name(f".{given.out.name}.export.lock")):
            parity = _export(given)
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax export: {mistake}", file=sys.stderr)
        return 2
    _print(given, parity)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("python -m prime_jax.export", description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=user_path, metavar="DIR", help="run folder, one checkpoint, or a bundle"
    )
    source.add_argument("--torch", type=user_path, metavar="FILE", help="weights trained in PyTorch instead")
    source.add_argument(
        "--untrained",
        metavar="DIM|NAME",
        help="what needs no training: for embeddings of a dimension, or reading texts with an encoder",
    )
    source.add_argument(
        "--general", action="store_const", const=True, help="the predictor of the package, which reads texts"
    )
    source.add_argument(
        "--from-adapter", type=user_path, metavar="FILE", help="an adapter, added to its --encoder"
    )
    source.add_argument(
        "--baseline", metavar="NAME", help=f"a tuned baseline, of {', '.join(UNTRAINED)}; needs --data"
    )
    parser.add_argument(
        "--like", type=user_path, metavar="DIR", help="with --torch: bundle to take config from"
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="bundle folder to write")
    parser.add_argument("--precision", default="fp32", metavar="LIST", help="of fp32,fp16,int8")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operators, 17 to 23 (default: 20)")
    parser.add_argument("--state-dict", action="store_true", help="add model.pt beside model.safetensors")
    parser.add_argument(
        "--data", type=user_path, metavar="DIR", help="data to measure on (default: the run's)"
    )
    add_source_options(parser)
    parser.add_argument("--max-loss", type=float, default=0.01, help="of R@10 in fp16, int8 (default: 0.01)")
    parser.add_argument("--allow-loss", action="store_true", help="write them even if they lose more")
    parser.add_argument("--model-version", help="semantic version (default: the bundle's, or 1.0.0)")
    parser.add_argument("--licence", metavar="TEXT", help="terms of the weights, for the model card")
    parser.add_argument("--sign", type=user_path, metavar="KEY", help=f"private key; password in ${PASSWORD}")
    parser.add_argument(
        "--adapter",
        type=user_path,
        metavar="FILE",
        help="also write what a run with train.lora_rank adds to its encoder, a few megabytes",
    )
    parser.add_argument(
        "--attribution", metavar="TEXT", help="what an --adapter was trained on, and whose that is"
    )
    parser.add_argument(
        "--share", type=float, metavar="X", help="of an --adapter that is added unless told otherwise, 0 to 1"
    )
    parser.add_argument(
        "--triton", type=user_path, metavar="DIR", help="also write a Triton model repository"
    )
    return parser


def _check(given: Namespace) -> None:
    """Refuse what contradicts itself, before anything is measured or written."""
    if not math.isfinite(given.max_loss):
        raise ExportError(f"--max-loss must be a number, not {given.max_loss}")
    check_source(given)
    if given.triton is None:
        return
    if given.triton.is_file():
        raise ExportError(f"{given.triton}: is a file; name a folder for the model repository")
    if given.triton.resolve().is_relative_to(given.out.resolve()):
        raise ExportError(f"{given.triton}: lies in the bundle; name another folder for the model repository")


def _export(given: Namespace) -> dict[str, Any]:
    from prime_jax.export.adapter import check_adapter_of, write_adapter_of
    from prime_jax.export.bundle import Options, facts_of, write_bundle
    from prime_jax.export.evidence import gather_evidence
    from prime_jax.export.quantize import parse_precisions
    from prime_jax.export.triton import write_repository
    from prime_jax.manifest import FIRST_VERSION
    from prime_jax.predict.predictor import load

    predictor = None if given.run is None else load(given.run, precision="float32", encoder=given.encoder)
    if predictor is not None and given.adapter is not None:
        check_adapter_of(predictor)
    known = {} if predictor is None else predictor.info()
    options = Options(
        precisions=parse_precisions(given.precision),
        opset=given.opset,
        model_version=given.model_version or known.get("model_version", FIRST_VERSION),
        licence=given.licence,
        state_dict=given.state_dict,
        max_loss=given.max_loss,
        allow_loss=given.allow_loss,
        private_key=given.sign,
        password=os.environ.get(PASSWORD),
    )
    if predictor is None:
        parity = write_without_run(given, options)
    else:
        data = given.data or _data_of(predictor, given.store)
        parity = write_bundle(
            predictor.model,
            given.out,
            facts=facts_of(predictor, given.run),
            target_head=predictor.target_head,
            confidence=predictor.confidence,
            options=options,
            evidence=gather_evidence(predictor, given.run, data, store=given.store) if data else None,
            encoder=_encoders_of(predictor),
            source=Path(predictor.info()["source"]),
        )
        if given.adapter is not None:
            said = {"licence": given.licence, "attribution": given.attribution}
            write_adapter_of(predictor, given.adapter, said, share=given.share)
    if given.triton is not None:
        write_repository(given.out, given.triton)
    return parity


def _encoders_of(predictor: Any) -> Path | None:
    """The folder of the encoders that were trained with a predictor, where there are such."""
    from prime_jax.pretrained.pair import FOLDER, is_pair

    folder = Path(predictor.info()["source"]) / FOLDER
    return folder if is_pair(folder) else None


def _data_of(predictor: Any, store: Path | None) -> Path | None:
    """The data folder a run was trained on, where it is still there, with its steering if that is needed.

    Its embeddings must be there as well, or in the run's store: no store is made where only a run says so.
    """
    from prime_jax.data.prepare import STORE
    from prime_jax.data.steered import ZERO
    from prime_jax.data.store import holds_store
    from prime_jax.evaluate.steering import steering_folder

    config = predictor.config
    folder = None if config is None or config.data.path is None else Path(config.data.path)
    needed = ("corpus", "train", "dev")
    there = folder is not None and all((folder / f"{name}.jsonl").is_file() for name in needed)
    if folder is not None and there and config.steered and config.steering.judge_with != ZERO:
        there = steering_folder(predictor, folder).is_dir()
    if folder is not None and there and store is None:
        known = [predictor.info().get(name) for name in ("encoder", "encoder_start")]
        stores = (folder / STORE, Path(config.data.store or folder / STORE))
        there = any(holds_store(root, *known) for root in stores)
    return folder if there else None


def _print(given: Namespace, parity: dict[str, Any]) -> None:
    for file in sorted(given.out.iterdir()):
        print(f"{file.name:<20}{file.stat().st_size:>14,} bytes")
    for name in ("onnxruntime", "torch"):
        found = parity[name]
        figures = f"differs from JAX by {found['max_abs_difference']:.1e} at most" if found["checked"] else ""
        print(f"{name:<20}{figures or 'not checked: ' + found['why']}")
    for name, difference in parity.get("text", {}).get("max_abs_difference", {}).items():
        print(f"{name:<22}differs from JAX by {difference:.1e} at most")
    for name, found in parity.get("precisions", {}).items():
        low, high = found["loss_interval"]
        print(
            f"{name:<20}cosine {found['cosine_mean']:.5f}, loses {found['loss']:.4f} of R@10 "
            f"(95% interval {low:.4f} to {high:.4f})"
        )
    leak = parity.get("leak_check", {"measured": False})
    if leak["measured"]:
        attack = leak["attacks"].get("calibrated", leak["attacks"]["prediction"])
        print(f"{'leak check':<20}AUC {attack['auc']:.3f} (0.5 is blind guessing); see MODEL_CARD.md")
    if given.triton is not None:
        print(f"{'triton':<20}{given.triton}")


if __name__ == "__main__":
    sys.exit(main())
