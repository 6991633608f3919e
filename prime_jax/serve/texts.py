"""The HTTP door of a model that reads texts: POST /predict_text."""

import asyncio

from fastapi import APIRouter, Request, Response
from pydantic import Field

from prime_jax.errors import ConfigError, OverloadedError
from prime_jax.frozen import Frozen
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.schema import Encoding, PredictorOutput
from prime_jax.predict.text import as_requests
from prime_jax.serve.answers import as_json, output
from prime_jax.serve.door import Door
from prime_jax.serve.faults import FAULTS
from prime_jax.serve.metrics import Metrics
from prime_jax.serve.settings import ServeSettings
from prime_jax.serve.waiting import in_time


class Question(Frozen):
    """A query and the turns before it, as texts."""

    context: list[str] = Field(default=[], description="the turns so far, oldest first")
    query: str = Field(description="the query")
    encoding: Encoding = Field(default="list", description="form of the predicted embedding in the answer")


def text_door(predictor: Predictor, settings: ServeSettings, metrics: Metrics) -> Door:
    """Predictions from texts, one device call at a time; everything is compiled here.

    Raises:
        ConfigError: For settings that only models that take embeddings know.
    """
    if settings.guard == "on" or settings.max_sessions:
        raise ConfigError("--guard on and --max-sessions go with models that take embeddings, not with texts")
    predictor.warmup()
    routes, device = APIRouter(responses=FAULTS), asyncio.Lock()
    running: set[asyncio.Task[PredictorOutput]] = set()
    metrics.gauge("queue_depth", "Requests that wait for the device.", lambda: max(len(running) - 1, 0))

    @routes.post("/predict_text", response_model=PredictorOutput)
    async def predict_text(request: Request, body: Question) -> Response:
        """Predict the embedding to search with. Stateless: the whole conversation comes with the request."""
        as_requests(body.context, body.query, predictor.model.config.max_context_length)
        if len(running) > settings.max_queue:  # one of them has the device
            raise OverloadedError(f"{len(running) - 1} requests are waiting already; try again later")

        async def computed() -> PredictorOutput:
            async with device:  # who has left before that is not computed
                thread = asyncio.create_task(
                    asyncio.to_thread(predictor.predict_text, body.context, body.query)
                )
                try:
                    vector = await asyncio.shield(thread)
                except asyncio.CancelledError:
                    await asyncio.wait((thread,))  # it cannot be stopped, and has the device until it ends
                    raise
            metrics.batch.observe(1)
            return output(vector, body.encoding)

        task = asyncio.create_task(computed())
        running.add(task)
        task.add_done_callback(running.discard)
        return as_json(await in_time(request, task, settings.timeout_s))

    return Door(routes, {"guard": False, "reads_text": True})
