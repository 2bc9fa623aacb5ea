"""The pages: traces and reports, from the templates in `pages/` (jinja2). Knows figures and text; knows no engine.

A page is one file that fetches nothing and runs no script. What models and data say is escaped by the templates.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Environment

    from detox_guard.results import Trace

__all__ = ["render", "trace_page"]


def trace_page(title: str, replies: Sequence[tuple[str, str, Trace]]) -> str:
    """One page for several replies, each `(prompt, caption, trace)`: steered tokens tinted, figures on hover."""
    return render("trace.html", title=title, replies=replies)


def render(template: str, **values: Any) -> str:
    """A template of `pages/`, filled in."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("detox_guard", "pages"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
