"""The gateway: the server's own application in front of replicas. Knows ASGI and the server; holds no model."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

from detox_guard.server import create_app, params_of
from ray import serve
from starlette.responses import JSONResponse

from ray_detox_guard.remote import RemoteModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ray_detox_guard.config import RayFile

__all__ = ["Gateway"]


@serve.ingress()
class Gateway:
    """Speaks HTTP for all models. Starts once every model has a replica (multiplexed ones are loaded when asked)."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, file: RayFile, handles: Mapping[str, DeploymentHandle]
    ) -> None:
        self._file = file
        self._models = {}
        for name, one in file.models.items():
            handle = handles[name]
            if file.ray.multiplexed is not None:
                handle = handle.options(multiplexed_model_id=name)
            model = RemoteModel(name, handle, params_of(one), guard=file.server.guard, retries=file.ray.retries)
            if file.ray.multiplexed is None:
                await model.learn()
            self._models[name] = model

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's own, called once the constructor is done. Raises `DataError`, `InvalidParamsError`, `ScorerError`."""
        return build(self._models, self._file)


def build(models: Mapping[str, Any], file: RayFile) -> FastAPI:
    """The application. Serve says where it listens, so `host` says only this: without keys, loopback alone."""
    config = file.server.replace(host="127.0.0.1")
    app = create_app(models, config)
    state = app.state.detox_guard
    if state.keys:
        state.configure(config.replace(host="0.0.0.0"))
    else:
        app.add_middleware(LoopbackOnly)
    return app


class LoopbackOnly:
    """Refuses, with 403, who asks from or at an address that others can reach: there are no API keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's own."""
        if scope["type"] == "http" and not all(_is_loopback(scope.get(end)) for end in ("server", "client")):
            told = "There are no API keys here, so only this machine is answered. Set DETOX_GUARD_API_KEYS."
            body = {"error": {"message": told, "type": "permission_error", "param": None, "code": "keys_needed"}}
            await JSONResponse(body, 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_loopback(address: Any) -> bool:
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except (TypeError, IndexError, ValueError):
        return False
