"""`python -m prime_jax.serve --run R`: answer predictions over HTTP."""

import logging
import signal
import socket
import sys
from collections.abc import Sequence

from prime_jax.errors import ConfigError, PredictorError
from prime_jax.progress import console
from prime_jax.serve.settings import read_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGTERM or Ctrl-C; 0 after a stop, 2 for a mistake, 130 stopped while loading."""
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv)
        try:
            import uvicorn

            from prime_jax.serve.app import build_app
            from prime_jax.serve.connections import server_config
        except ImportError as missing:
            raise ConfigError(f"{missing}; install it with: pip install 'prime-jax[serve]'") from None
        from prime_jax.predict.adapter import general
        from prime_jax.predict.predictor import load
        from prime_jax.predict.untrained import untrained

        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        listening = _bind(settings.host, settings.port)
        if settings.general:
            predictor = general()
        elif settings.run is None:
            predictor = untrained(settings.untrained, max_turns=settings.max_turns or 10)
        else:
            console.print(f"Loading {settings.run}")
            predictor = load(settings.run, precision=settings.precision, encoder=settings.encoder)
        app = build_app(predictor, settings)
    except KeyboardInterrupt:
        return 130
    except PredictorError as mistake:
        print(f"prime-jax serve: {mistake}", file=sys.stderr)
        return 2
    # uvicorn raises the signal again once it has stopped; by then there is nothing left to interrupt.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = server_config(app, settings)
    listening.listen(config.backlog)  # who calls from here on waits a moment instead of being refused
    port = listening.getsockname()[1]
    console.print(f"Serving on http://{settings.host}:{port} (Ctrl-C stops)", highlight=False)
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    return 0 if server.started else 2


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before anything is loaded. Connections are refused until the model is there."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as refused:
        raise ConfigError(f"cannot listen on {host}:{port}: {refused.strerror}") from None
    return bound


if __name__ == "__main__":
    sys.exit(main())
