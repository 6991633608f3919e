"""The HTTP door: POST /predict, /sessions, GET /health, /metrics; OpenAPI under /docs and /openapi.json."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException

from prime_jax._version import __version__
from prime_jax.errors import OverloadedError, PredictorError, WrongAnswerError
from prime_jax.frozen import Frozen
from prime_jax.predict.inputs import check_norms, checked
from prime_jax.predict.judging import check_guard
from prime_jax.predict.predictor import Predictor
from prime_jax.predict.schema import Encoding, PredictorInput, PredictorOutput, Vector
from prime_jax.serve.limits import GONE, BodyLimit, Observe
from prime_jax.serve.metrics import Metrics
from prime_jax.serve.sessions import NoSuchSessionError, Sessions
from prime_jax.serve.settings import ServeSettings

T = TypeVar("T")
UNIT = 1e-3  # by which the norm of a prediction that leaves the server may be off
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


class ClientGoneError(Exception):
    """The client hung up before its answer was ready."""


def build_app(predictor: Predictor, settings: ServeSettings) -> FastAPI:
    """The application that serves a predictor.

    Args:
        predictor: What predicts, warmed up.
        settings: Limits and time-outs.
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
    metrics = Metrics()
    batcher = predictor.batcher(
        max_delay_ms=settings.max_delay_ms, max_queue=settings.max_queue, on_call=metrics.batch.observe
    )
    sessions = Sessions(settings.max_sessions, settings.session_idle_s)
    if settings.max_sessions:
        predictor.session()  # compiled now, not at the first request

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="prime-jax", version=__version__, lifespan=lifespan)
    app.state.metrics = metrics
    limit = settings.body_limit(config)
    app.add_middleware(BodyLimit, limit=limit, seconds=settings.timeout_s)
    app.add_middleware(Observe, metrics=metrics)
    _answer_errors(app)
    app.include_router(_session_routes(predictor, sessions, settings, guard))
    metrics.gauge("queue_depth", "Requests that wait for the device.", lambda: batcher.stats().waiting)
    metrics.gauge("sessions", "Sessions kept.", lambda: len(sessions))

    @app.post("/predict", responses=_FAULTS, response_model=PredictorOutput)
    async def predict(request: Request, body: PredictorInput) -> Response:
        """Predict the embedding to search with. Stateless: the whole window comes with the request."""
        context, query = body.context_embeddings, body.query_embedding
        check_norms("context_embeddings", context, zero=True)  # as `predict` does, by the names of the body
        check_norms("query_embedding", query)
        vector = await _in_time(request, batcher.predict_async(context, query), settings.timeout_s)
        return _json(_judged(predictor, context, query, vector, guard, body.encoding))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """What is served. The server listens only once everything is compiled, so an answer means ready."""
        return {"status": "ok", "guard": guard, "predictions_used": used, **_facts(predictor)}

    @app.get("/metrics", include_in_schema=False)
    async def figures() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _session_routes(
    predictor: Predictor, sessions: Sessions, settings: ServeSettings, guard: bool
) -> APIRouter:
    """Conversations kept by this process. A replica knows only its own, so route a session to one replica."""
    routes = APIRouter(prefix="/sessions", tags=["sessions"], responses=_FAULTS)

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
        return await _in_time(request, asyncio.shield(task), settings.timeout_s)

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
            return _judged(predictor, context[mask], body.query_embedding, vector, guard, body.encoding)

        return _json(await use(request, name, work))

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


def _judged(
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
    norm = np.linalg.norm(vector)
    if not abs(norm - 1) <= UNIT or not (sure is None or 0 <= sure <= 1):  # NaN is neither
        raise WrongAnswerError(f"norm {norm:.3g}, confidence {sure}, for {len(context)} turns")
    return PredictorOutput.of(vector, encoding, sure, trust if guard else None)


def _length(session: Any) -> int:
    return int(session.lengths[0])


async def _in_time(request: Request, work: Awaitable[T], seconds: float) -> T:
    """The result of `work`; where time is up (504) or the client hangs up, the work is cancelled."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hangs_up(request))
    try:
        done, _ = await asyncio.wait((doing, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing in done:
            return doing.result()
        if leaving in done:
            raise ClientGoneError
        raise HTTPException(504, f"no answer within {seconds:g} s")
    finally:
        doing.cancel()
        leaving.cancel()


async def _hangs_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(answer: PredictorOutput) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


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


class Fault(Frozen):
    """An error, in plain words."""

    error: str


_NO_JSON = "the body is not valid JSON"
_FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": Fault, "description": "not JSON"},
    408: {"model": Fault, "description": "the body did not come in time"},
    413: {"model": Fault, "description": "body too large"},
    415: {"model": Fault, "description": "the body is not called JSON, or is compressed"},
    422: {"model": Fault, "description": "wrong shape or dimension, NaN, no embedding's norm, unknown field"},
    503: {"model": Fault, "description": "too many requests are waiting"},
    504: {"model": Fault, "description": "no answer in time"},
}


def _answer_errors(app: FastAPI) -> None:
    """Every error as `{"error": "..."}` with the status that fits; nothing of the inside gets out."""

    def fault(status: int, message: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = error.errors()
        if "json" not in request.headers.get("content-type", "") and "/state" not in request.url.path:
            return fault(415, "send the body with the header 'Content-Type: application/json'")
        if any(one["type"] == "json_invalid" for one in faults):
            return fault(400, _NO_JSON)
        return fault(422, "; ".join(_told(one) for one in faults[:5]))

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, WrongAnswerError):
            raise error  # logged, and answered with 500
        if isinstance(error, OverloadedError):
            return fault(503, str(error), **{"Retry-After": "1"})
        return fault(404 if isinstance(error, NoSuchSessionError) else 422, str(error))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        unread = error.status_code == 400  # by the framework: too deep, too many digits, no UTF-8
        return fault(error.status_code, _NO_JSON if unread else str(error.detail))

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=GONE)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(PredictorError, refused)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGoneError, gone)


def _told(fault: Any) -> str:
    """One fault of a body in plain words, without repeating what was sent but the start of a field's name."""
    where = ".".join(str(part) for part in fault["loc"] if part != "body")[:60]
    return f"{where or 'body'}: {fault['msg'].removeprefix('Value error, ')}"
