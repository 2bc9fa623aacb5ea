"""The playground: one page, its stylesheet and its script, from the package. Knows files and one strict policy."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import Response

import detox_guard
from detox_guard.html import render

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["add_page"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """Serve it at `/`."""
    page = render("playground.html", version=detox_guard.__version__)
    style, script = _file("playground.css"), _file("playground.js")

    @app.get("/", include_in_schema=False)
    async def playground() -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    @app.get("/playground.css", include_in_schema=False)
    async def stylesheet() -> Response:
        return Response(style, media_type="text/css")

    @app.get("/playground.js", include_in_schema=False)
    async def javascript() -> Response:
        return Response(script, media_type="text/javascript")


def _file(name: str) -> str:
    return (files("detox_guard") / "pages" / name).read_text(encoding="utf-8")
