"""`python -m prime_jax.train`: train a predictor."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from prime_jax.config import read_config, to_yaml
from prime_jax.errors import ConfigError, PredictorError
from prime_jax.files import user_path

CONFIG = "config.yaml"
SETTINGS = """settings:
  --section.name VALUE    any setting, for instance --model.num-layers 2 --train.num-epochs 3 --data.path DIR;
                          --print-config lists them all. YAML < environment (PRIME_TRAIN__SEED=3) < these.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 for a user's mistake, 130 when interrupted."""
    parser = ArgumentParser(
        "python -m prime_jax.train",
        description="Train an embedding predictor.",
        epilog=SETTINGS,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=user_path, metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--out", type=user_path, metavar="DIR", help="run folder: checkpoints, history, curves"
    )
    parser.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    parser.add_argument(
        "--encoder", metavar="NAME", help="as --data.encoder; --resume needs it where the run's is code"
    )
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps to OUT/profile")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="first of several processes, if not found")
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    parser.add_argument("--print-config", action="store_true", help="print the settings as YAML and stop")
    given, settings = parser.parse_known_args(argv)
    try:
        if given.encoder is not None:
            settings += ["--data.encoder", given.encoder]
        stored = given.out / CONFIG if given.resume and given.out else None
        config = read_config(given.config or stored, settings, stored=given.config is None)
        if given.print_config:
            print(to_yaml(config), end="")
            return 0
        if given.out is None:
            raise ConfigError("--out is missing: name the run folder")
        from prime_jax.train.loop import train
        from prime_jax.train.processes import connected
        from prime_jax.train.setup import resumed

        with connected(os.environ, given.coordinator, given.num_processes, given.process_id):
            if given.resume and given.config is None:
                config = resumed(config, given.out, settings)
            outcome = train(config, given.out, resume=given.resume, profile=given.profile)
    except PredictorError as mistake:
        print(f"prime-jax train: {mistake}", file=sys.stderr)
        return 2
    if outcome.interrupted:
        print(f"stopped at step {outcome.step}; saved. Go on with the same command and --resume")
        return 130
    print(f"finished after {outcome.step} steps; the run is in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
