"""`python -m prime_jax.export`: write a bundle for ONNX Runtime, PyTorch and JAX."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from prime_jax.errors import PredictorError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake."""
    parser = ArgumentParser("python -m prime_jax.export", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="run folder, or one checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="bundle folder to write")
    given = parser.parse_args(argv)
    try:
        from prime_jax.export.bundle import facts_of, write_bundle
        from prime_jax.predict.predictor import load

        predictor = load(given.run, precision="float32")
        parity = write_bundle(
            predictor.model,
            given.out,
            facts=facts_of(predictor, given.run),
            target_head=predictor.target_head,
        )
    except (PredictorError, OSError) as mistake:
        print(f"prime-jax export: {mistake}", file=sys.stderr)
        return 2
    for file in sorted(given.out.iterdir()):
        print(f"{file.name:<20}{file.stat().st_size:>14,} bytes")
    for name in ("onnxruntime", "torch"):
        found = parity[name]
        figures = f"differs from JAX by {found['max_abs_difference']:.1e} at most" if found["checked"] else ""
        print(f"{name:<20}{figures or 'not checked: ' + found['why']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
