"""`prime-jax verify`: is a bundle or a run as it was written, and does it compute the same here?"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prime_jax.errors import CheckpointError, ExportError, PredictorError
from prime_jax.export.interface import Interface
from prime_jax.export.interfaces import interface_of
from prime_jax.export.signing import verify_signature
from prime_jax.files import user_path
from prime_jax.manifest import MANIFEST, SIGNATURE, read_manifest, verify_manifest
from prime_jax.models.bundle import KIND as BUNDLE
from prime_jax.models.bundle import read_config, read_tensors
from prime_jax.models.prime import PredictorConfig
from prime_jax.train.checkpoints import KIND as CHECKPOINT
from prime_jax.train.checkpoints import check_restorable, list_checkpoints

RUNTIME = "torch_runtime.py"
ROOM = 1e-4  # that a processor which rounds in another order may take from float32
ROOM_IN_COSINE = 1e-3  # the same for lower precisions, beside what was measured when they were written


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 if everything holds, 1 if something does not, 2 for a user's mistake."""
    parser = ArgumentParser("prime-jax verify", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=user_path, metavar="DIR", help="bundle, checkpoint, or run folder")
    parser.add_argument("--run-onnx", action="store_true", help="repeat the golden requests in ONNX Runtime")
    parser.add_argument(
        "--run-torch",
        action="store_true",
        help="repeat them in PyTorch; code of the bundle that is not ours runs only with --public-key",
    )
    parser.add_argument(
        "--public-key", type=user_path, metavar="KEY", help="check the signature with this key"
    )
    given = parser.parse_args(argv)
    try:
        for line in verify(given.folder, given.public_key, onnx=given.run_onnx, torch=given.run_torch):
            print(line, flush=True)
    except CheckpointError as broken:
        print(f"prime-jax verify: {broken}", file=sys.stderr)
        return 1
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax verify: {mistake}", file=sys.stderr)
        return 2
    return 0


def verify(
    folder: Path, public_key: Path | None = None, *, onnx: bool = False, torch: bool = False
) -> Iterator[str]:
    """Check a bundle, a checkpoint, or all checkpoints of a run; yield a line for each check that holds.

    What a checkpoint holds is read back, too, as resuming and predicting would.

    Args:
        folder: What to check.
        public_key: PEM file of who is to have signed it; None leaves a signature unchecked.
        onnx: Repeat the golden requests in ONNX Runtime, with every ONNX file.
        torch: Repeat them in the bundle's own PyTorch module.

    Raises:
        CheckpointError: At the first thing that does not hold; the message names it.
        ExportError: If there is nothing to check here, or the package for a check is missing.
    """
    if not (folder / MANIFEST).is_file():
        found = list_checkpoints(folder) if folder.is_dir() else []
        if not found:
            raise ExportError(f"{folder}: neither a bundle nor a checkpoint nor a run with checkpoints")
        for checkpoint in found:
            yield from verify(checkpoint.folder, public_key, onnx=onnx, torch=torch)
        return
    kind = read_manifest(folder)["kind"]
    if kind not in (BUNDLE, CHECKPOINT):
        raise CheckpointError(f"{folder / MANIFEST}: describes a {kind!r}, not a bundle or a checkpoint")
    manifest = verify_manifest(folder, kind)
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    yield (
        f"{folder}: {kind}, version {manifest['model_version']}, {len(manifest['files'])} files, "
        f"{size:,} bytes, every SHA-256 as in {MANIFEST}"
    )
    yield from _signature(folder, public_key)
    if kind == CHECKPOINT:
        yield f"{folder}: {', '.join(check_restorable(folder))} restored"
    if (onnx or torch) and kind != BUNDLE:
        raise ExportError(f"{folder}: is a {kind}; golden requests are in bundles only")
    if onnx:
        yield from _onnx(folder, manifest)
        yield from _text(folder)
    if torch:
        ours = _interface(folder).torch_source()
        if (folder / RUNTIME).read_bytes() != ours.encode() and public_key is None:
            yield f"{RUNTIME}: of another version, not run without --public-key; ours is instead"
        yield _exact(folder, "torch", None, source=ours if public_key is None else None)


def _interface(bundle: Path) -> Interface:
    """How the model that a bundle holds is called."""
    try:
        return interface_of(read_config(bundle))
    except CheckpointError:  # running it will say what is wrong with the config
        return interface_of(PredictorConfig())


def _signature(folder: Path, public_key: Path | None) -> Iterator[str]:
    if public_key is not None:
        verify_signature(folder, public_key)
        yield f"signed by the owner of {public_key}"
    elif (folder / SIGNATURE).is_file():
        yield "signed, but by whom is not checked; name the signer's key with --public-key"


def _onnx(bundle: Path, manifest: dict[str, Any]) -> Iterator[str]:
    from prime_jax.export.golden import min_cosine, onnxruntime_answers
    from prime_jax.files import read_json

    for precision, file in manifest["onnx"].items():
        if precision == "fp32":
            yield _exact(bundle, "onnxruntime", file)
            continue
        golden = _golden(bundle)
        answers = _run(bundle / file, partial(onnxruntime_answers, golden, bundle, file))
        cosine = min_cosine(answers["embedding"], golden["embedding"])
        try:
            found = read_json(bundle / "parity.json")["precisions"][precision]
            expected = float(found["golden_min_cosine"])
        except (KeyError, TypeError, ValueError):
            missing = f"{bundle / 'parity.json'}: does not say how close {precision} was"
            raise CheckpointError(missing) from None
        if not cosine >= expected - ROOM_IN_COSINE:
            raise CheckpointError(
                f"{bundle / file}: cosine {cosine:.6f} to the golden answers here, {expected:.6f} where it "
                "was written"
            )
        yield f"{file}: smallest cosine to the golden answers {cosine:.6f} ({expected:.6f} where written)"


def _text(bundle: Path) -> Iterator[str]:
    from prime_jax.export.text import TEXT, check_text

    difference = _run(bundle / TEXT, partial(check_text, bundle))
    if difference is None:
        return
    if not difference <= ROOM:
        raise CheckpointError(
            f"{bundle / TEXT}: onnxruntime differs from the golden answers by {difference:.1e} here"
        )
    yield f"{TEXT}: golden texts in onnxruntime, largest difference {difference:.1e}"


def _exact(bundle: Path, runtime: str, file: str | None, *, source: str | None = None) -> str:
    from prime_jax.export.golden import differences, onnxruntime_answers, torch_answers

    golden, name = _golden(bundle), file or RUNTIME
    work = (
        partial(onnxruntime_answers, golden, bundle, file)
        if file
        else partial(torch_answers, golden, bundle, source, _interface(bundle))
    )
    answers = _run(bundle / name, work)
    try:
        found = differences(answers, golden)
    except ExportError as unlike:
        raise CheckpointError(f"{bundle / name}: {unlike}") from None
    for output, difference in found.items():
        if not difference <= ROOM:
            where = "" if output == "embedding" else f" in {output}"
            raise CheckpointError(
                f"{bundle / name}: {runtime} differs from the golden answers by {difference:.1e}{where} on "
                "this machine"
            )
    difference = max(found.values())
    count = len(golden["embedding"])
    return f"{name}: {count} golden requests in {runtime}, largest difference {difference:.1e}"


def _run(path: Path, work: Callable[[], Any]) -> Any:
    """What a runtime answers; a file that it cannot run does not hold what it should."""
    try:
        return work()
    except ModuleNotFoundError as missing:
        raise ExportError(f"{path}: {missing.name} is not installed") from None
    except Exception as failed:  # every runtime has its own kinds
        reason = (str(failed) or type(failed).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be run: {reason}") from None


def _golden(bundle: Path) -> dict[str, Any]:
    golden = read_tensors(bundle / "golden.safetensors")
    for name in (*_interface(bundle).names, "embedding"):
        if name not in golden:
            raise CheckpointError(f"{bundle / 'golden.safetensors'}: tensor {name!r} is missing")
    return golden


if __name__ == "__main__":
    sys.exit(main())
