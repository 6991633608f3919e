"""The HTTP door of a model that takes embeddings: POST /predict, and /sessions."""

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Body, Request, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from prime_jax.errors import OverloadedError
from prime_jax.frozen import Frozen
from prime_jax.predict.inputs import check_norms, checked
from prime_jax.predict.judging import check_guard
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.schema import Encoding, PredictorInput, PredictorOutput, Vector
from prime_jax.serve.answers import as_json, output
from prime_jax.serve.door import Door
from prime_jax.serve.faults import FAULTS
from prime_jax.serve.metrics import Metrics
from prime_jax.serve.sessions import Sessions
from prime_jax.serve.settings import ServeSettings
from prime_jax.serve.waiting import in_time

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Turn(Frozen):
    """A turn to add to a session."""

    turn_embedding: Vector = Field(description="embedding of the turn")


class Query(Frozen):
    """A query to a session."""

    query_embedding: Vector = Field(description="embedding of the query")
    encoding: Encoding = Field(default="list", description="form of the predicted embedding in the answer")


class SessionState(Frozen):
    """Which session, and how many turns it holds."""

    id: str
    turns: int


def embedding_door(predictor: Predictor, settings: ServeSettings, metrics: Metrics) -> Door:
    """Predictions from embeddings, joined into few device calls, and sessions.

    Raises:
        PredictorError: If a guard is asked for that the model does not have.
    """
    config = predictor.model.config
    guard = settings.guards(predictor.confidence is not None and config.input_dim == config.output_dim)
    if guard:
        check_guard(config, predictor.confidence)  # refused now, not at the first request
    used = not (guard and predictor.confidence is not None and predictor.confidence.strength[0] == 0)
    if not used:
        _LOG.warning(
            "validation did not show that these predictions beat %s, so the guard always serves that; "
            "--guard off serves predictions",
            predictor.confidence and predictor.confidence.fallback_mix,
        )
    batcher = predictor.batcher(
        max_delay_ms=settings.max_delay_ms, max_queue=settings.max_queue, on_call=metrics.batch.observe
    )
    sessions = Sessions(settings.max_sessions, settings.session_idle_s)
    if settings.max_sessions:
        predictor.session()  # compiled now, not at the first request
    metrics.gauge("queue_depth", "Requests that wait for the device.", lambda: batcher.stats().waiting)
    metrics.gauge("sessions", "Sessions kept.", lambda: len(sessions))
    routes = APIRouter()
    routes.include_router(_session_routes(predictor, sessions, settings, guard))

    @routes.post("/predict", responses=FAULTS, response_model=PredictorOutput)
    async def predict(request: Request, body: PredictorInput) -> Response:
        """Predict the embedding to search with. Stateless: the whole window comes with the request."""
        context, query = body.context_embeddings, body.query_embedding
        check_norms("context_embeddings", context, zero=True)  # as `predict` does, by the names of the body
        check_norms("query_embedding", query)
        vector = await in_time(request, batcher.predict_async(context, query), settings.timeout_s)
        return as_json(_guarded_output(predictor, context, query, vector, guard, body.encoding))

    return Door(routes, {"guard": guard, "predictions_used": used}, batcher.close)


def _session_routes(
    predictor: Predictor, sessions: Sessions, settings: ServeSettings, guard: bool
) -> APIRouter:
    """Conversations kept by this process. A replica knows only its own, so route a session to one replica."""
    routes = APIRouter(prefix="/sessions", tags=["sessions"], responses=FAULTS)

    running: set[asyncio.Task[Any]] = set()

    def enabled() -> None:
        if settings.max_sessions == 0:
            raise HTTPException(
                404,
                "this server keeps no sessions; start it with --max-sessions, or use /predict",
            )

    async def use(request: Request, name: str, work: Callable[[Any], T]) -> T:
        """Run `work(session)` on a thread, one at a time for each session, and always to its end."""
        enabled()
        kept = sessions.find(name)
        if len(running) >= settings.max_queue:
            raise OverloadedError(f"{len(running)} requests to sessions are waiting already; try again later")

        async def alone() -> T:
            async with kept.lock:
                return await asyncio.to_thread(work, kept.session)

        task = asyncio.create_task(alone())
        running.add(task)
        task.add_done_callback(running.discard)
        return await in_time(request, asyncio.shield(task), settings.timeout_s)

    @routes.post("", status_code=201)
    async def create() -> SessionState:
        """Start a session."""
        enabled()
        sessions.make_room()
        return SessionState(id=sessions.keep(await asyncio.to_thread(predictor.session)), turns=0)

    @routes.get("/{name}")
    async def look(request: Request, name: str) -> SessionState:
        """How many turns a session holds."""
        return SessionState(id=name, turns=await use(request, name, _length))

    @routes.delete("/{name}", status_code=204)
    async def drop(name: str) -> None:
        """Forget a session."""
        enabled()
        sessions.drop(name)

    @routes.post("/{name}/turns")
    async def append(request: Request, name: str, body: Turn) -> SessionState:
        """Add a turn; where the window is full the oldest drops out."""
        check_norms("turn_embedding", body.turn_embedding, zero=True)

        def work(session: Any) -> int:
            session.append(body.turn_embedding)
            return _length(session)

        return SessionState(id=name, turns=await use(request, name, work))

    @routes.post("/{name}/predict", response_model=PredictorOutput)
    async def predict(request: Request, name: str, body: Query) -> Response:
        """Predict the embedding to search with, from the session's turns."""
        check_norms("query_embedding", body.query_embedding)

        def work(session: Any) -> PredictorOutput:
            vector = session.predict(body.query_embedding)
            (context,), (mask,) = session.window()
            return _guarded_output(
                predictor, context[mask], body.query_embedding, vector, guard, body.encoding
            )

        return as_json(await use(request, name, work))

    @routes.get("/{name}/state", response_class=Response)
    async def save(request: Request, name: str) -> Response:
        """The session as a file, to go on elsewhere."""
        saved = await use(request, name, lambda session: session.save())
        return Response(saved, media_type="application/octet-stream")

    @routes.put("/{name}/state")
    async def restore(
        request: Request, name: str, saved: Annotated[bytes, Body(media_type="application/octet-stream")]
    ) -> SessionState:
        """Go on from a file that a session gave."""

        def work(session: Any) -> int:
            session.restore(saved)
            return _length(session)

        return SessionState(id=name, turns=await use(request, name, work))

    return routes


def _guarded_output(
    predictor: Predictor,
    context: np.ndarray,
    query: np.ndarray,
    vector: np.ndarray,
    guard: bool,
    encoding: Encoding,
) -> PredictorOutput:
    """The prediction `[E]` for turns `[n, D]` and a query `[D]`, guarded if asked for; its confidence."""
    request = checked(predictor.model.config, context, query)
    vector, sure, trust = predictor.judge(request, vector[None], guard=guard).first()
    return output(vector, encoding, None if sure is None else float(sure), float(trust) if guard else None)


def _length(session: Any) -> int:
    return int(session.lengths[0])
