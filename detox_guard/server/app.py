"""`create_app`: the routes of OpenAI's interface around one model or several. Knows routes; leaves requests to
`asking`, answers to `answers`, and what stands before them to `gate`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException as StarletteHTTPException

import detox_guard
from detox_guard._threads import run_off_loop
from detox_guard.errors import InvalidParamsError
from detox_guard.server.answers import Answer, event
from detox_guard.server.asking import Asked, ask_chat, ask_completion
from detox_guard.server.config import ServerConfig
from detox_guard.server.errors import ApiError, Json, api_error, error_response, validation_error
from detox_guard.server.gate import Gate, Visit
from detox_guard.server.models import Model, Models, Served
from detox_guard.server.moderation import moderate
from detox_guard.server.page import add_page
from detox_guard.server.replies import Gone, said, unless_gone
from detox_guard.server.schemas import ChatRequest, CompletionRequest, ModerationRequest  # noqa: TC001  (FastAPI reads it)
from detox_guard.server.state import State
from detox_guard.server.telemetry import traced

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractContextManager

    from starlette.types import Receive, Scope, Send

    from detox_guard.server.keys import Keys


__all__ = ["create_app"]


def create_app(
    model: Any | Mapping[str, Any], config: ServerConfig | None = None, *, keys: Keys | None = None, own: bool = False
) -> FastAPI:
    """An ASGI application that serves a `DetoxiGen`, or several by name (the first is the default).

    Requests are guarded by `config.guard` unless a model's own `params` have a guard. `keys`: None reads
    `config.api_keys` and the environment. `own`: the application closes the models when it ends.
    `app.state.detox_guard` is what it holds. Raises `InvalidParamsError`, `DataError`, `ScorerError`.
    """
    config = ServerConfig() if config is None else config
    if not isinstance(config, ServerConfig):
        raise InvalidParamsError("config", config, "a ServerConfig or None")
    named: dict[str, Model] = dict(model) if isinstance(model, Mapping) else {model.model_id: model}
    models = Models(named, own=own)
    state = State(models, config, keys)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await run_off_loop(models.close)

    app = FastAPI(
        title="detox-guard", version=detox_guard.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.detox_guard = state
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(Gate, state=state)
    _add_errors(app)
    _add_routes(app, state)
    if config.playground:
        add_page(app)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(StarletteHTTPException)
    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: StarletteHTTPException) -> Response:
        told = error if isinstance(error, ApiError) else ApiError(error.status_code, f"{error.detail}.")
        return error_response(told)


def _add_routes(app: FastAPI, state: State) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        """It takes requests."""
        fine = state.models.ready and not state.draining
        return Json({"status": "ready" if fine else "not ready"}, 200 if fine else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(state.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What can be asked."""
        standing = None if state.config.guard is None else state.config.guard.threshold
        told = {"guard_threshold": standing, "allow_unguarded": state.loose}
        return {"object": "list", "data": [one.told() for one in state.models], "detox": told}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        return state.models.find(name).told()

    @app.post("/v1/moderations")
    async def moderations(body: ModerationRequest) -> Response:
        """Texts, scored."""
        return Json(await run_off_loop(moderate, body, state.config))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next turn of a chat."""
        served = state.models.find(body.model)
        asked = ask_chat(body, served.model.params, state.config, loose=state.loose)
        return await _answered("chat", state, served, asked, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Text that goes on with a text."""
        served = state.models.find(body.model)
        asked = ask_completion(body, served.model.params, state.config, loose=state.loose)
        return await _answered("text", state, served, asked, request)


async def _answered(
    kind: Literal["chat", "text"], state: State, served: Served, asked: Asked, request: Request
) -> Response:
    if asked.logprobs and not getattr(served.model, "tells_tokens", True):
        raise ApiError(400, "logprobs: not of a model behind another endpoint.", "invalid_value", param="logprobs")
    answer = Answer(kind, served.name, asked)
    visit: Visit = request.scope["visit"]
    visit.told |= {"model": served.name, "stream": asked.stream, "choices": len(asked.prompts)}
    operation = "chat" if kind == "chat" else "text_completion"
    around = partial(traced, state, operation, served.name, asked, answer, request.headers)
    if asked.stream:
        return _Stream(state, served, asked, answer, visit, around)

    async def whole() -> None:
        with state.models.use(served) as model, around():
            # A model elsewhere may begin anew what nobody saw yet.
            whole_model = getattr(model, "unstreamed", model)
            async with aclosing(said(whole_model, asked, state.meters, served.name)) as chunks:
                async for item in chunks:
                    assert item is not None, "no pings were asked for"
                    answer.keep(*item)

    await unless_gone(request.receive, whole(), state.ended)
    _note(visit, state, asked, answer)
    return Json(answer.whole())


class _Stream(Response):
    """An answer as server-sent events. Its status waits for the first word, so that what is refused is no stream."""

    media_type = "text/event-stream"

    def __init__(
        self,
        state: State,
        served: Served,
        asked: Asked,
        answer: Answer,
        visit: Visit,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"
        self._state, self._served, self._asked, self._answer, self._visit = state, served, asked, answer, visit
        self._around, self._begun = around, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's own. An error before the first word is raised; later it is an event, and so is the server's end."""

        async def put(*events: str) -> None:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                events = (*self._answer.opening(), *events)
            if events:
                await send({"type": "http.response.body", "body": "".join(events).encode(), "more_body": True})

        async def run() -> None:
            with self._state.models.use(self._served) as model, self._around():
                heard = said(
                    model, self._asked, self._state.meters, self._served.name, ping_s=self._state.config.ping_s
                )
                async with aclosing(heard) as chunks:
                    async for item in chunks:
                        await put(": alive\n\n" if item is None else "".join(self._answer.push(*item)))
            await put(*self._answer.closing())

        try:
            await unless_gone(receive, run(), self._state.ended)
        except Exception as error:
            told = api_error(error)
            self._visit.told["code"] = told.code
            if not self._begun or isinstance(error, Gone):
                raise
            await put(event(told.body), "data: [DONE]\n\n")
        finally:
            _note(self._visit, self._state, self._asked, self._answer)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _note(visit: Visit, state: State, asked: Asked, answer: Answer) -> None:
    """What the log says of a request that was decoded."""
    replies = answer.replies
    visit.told |= {
        "usage": answer.usage(),
        "ended": [reply.finish_reason for reply in replies],
        "taken_back": sum(reply.usage.discarded_tokens for reply in replies),
    }
    if state.config.log_text:
        visit.told |= {"prompts": [str(prompt) for prompt, _ in asked.prompts], "replies": [r.text for r in replies]}
