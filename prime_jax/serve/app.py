"""The server: routes of the model that is served, /health and /metrics; OpenAPI under /docs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response

from prime_jax._version import __version__
from prime_jax.predict.predictor import Predictor
from prime_jax.serve.embeddings import embedding_door
from prime_jax.serve.faults import answer_errors
from prime_jax.serve.limits import BodyLimit, Observe
from prime_jax.serve.metrics import Metrics
from prime_jax.serve.settings import ServeSettings
from prime_jax.serve.texts import text_door


def build_app(predictor: Predictor, settings: ServeSettings) -> FastAPI:
    """The application that serves a predictor; everything it needs is compiled here.

    Args:
        predictor: What predicts.
        settings: Limits and time-outs.

    Raises:
        ConfigError: For settings that its kind of model does not know.
        PredictorError: If a guard is asked for that it does not have.
    """
    metrics = Metrics()
    door = (text_door if predictor.reads_text else embedding_door)(predictor, settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if door.close is not None:
            await asyncio.to_thread(door.close)

    app = FastAPI(title="prime-jax", version=__version__, lifespan=lifespan)
    app.state.metrics = metrics
    limit = settings.body_limit(predictor.model.config)
    app.add_middleware(BodyLimit, limit=limit, seconds=settings.timeout_s)
    app.add_middleware(Observe, metrics=metrics)
    answer_errors(app)
    app.include_router(door.routes)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """What is served. The server listens only once everything is compiled, so an answer means ready."""
        return {"status": "ok", **door.health, **_facts(predictor)}

    @app.get("/metrics", include_in_schema=False)
    async def figures() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _facts(predictor: Predictor) -> dict[str, Any]:
    """What a client needs to know of the model; nothing of where it lies."""
    info, config = predictor.info(), predictor.model.config
    wanted = ("prime_jax", "parameters", "precision", "device", "encoder", "step", "data_hash")
    return {
        **{name: info[name] for name in wanted if name in info},
        "input_dim": config.input_dim,
        "output_dim": config.output_dim,
        "max_context_length": config.max_context_length,
    }
