"""What the commands share on a terminal: consoles, error lines, exit codes, tinted text.

Knows rich and the figures of a trace; knows no model. torch is never imported here.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING

from detox_guard.errors import (
    BackboneError,
    DataError,
    DetoxGuardError,
    DetoxifierError,
    InvalidParamsError,
    PromptError,
    ScorerError,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from detox_guard.results import Trace

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_PIPE",
    "exit_code",
    "print_json",
    "report",
    "score_text",
    "stderr_console",
    "stdout_console",
    "tinted",
    "visible",
]

EXIT_FAILED, EXIT_INPUT, EXIT_LOAD, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 3, 130, 141

FAINT = 0.04
"""Share of the deepest tint under which a token is left alone."""
_PALE, _DEEP = (255, 232, 207), (238, 132, 52)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def stdout_console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def stderr_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def exit_code(error: Exception) -> int:
    """The documented exit code of an error."""
    if isinstance(error, InvalidParamsError | PromptError | DataError):
        return EXIT_INPUT
    if isinstance(error, BackboneError | DetoxifierError | ScorerError):
        return EXIT_LOAD
    return EXIT_FAILED


def report(error: DetoxGuardError, where: str = "") -> None:
    """One line `error: …` on stderr, and one `hint: …` if there is one."""
    print(f"error: {where}{_one_line(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {_one_line(error.hint)}", file=sys.stderr)


def print_json(text: str) -> None:
    """Print one line of JSON. Where stdout cannot write some character of it (a Windows code page, say), all that is
    not ASCII is escaped, which is the same JSON."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    print(text, flush=True)


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))


def visible(text: str) -> str:
    """Text whose control characters cannot steer the terminal: a model may emit any of them."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def tinted(trace: Trace | None, text: str) -> Text:
    """The reply; the harder a token was steered, the deeper its background. Underlined: the plain model's first choice
    was another token."""
    from rich.style import Style
    from rich.text import Text

    if trace is None:
        return Text(visible(text))
    shown = Text()
    for token in trace.tokens:
        if token.strength < FAINT:
            shown.append(visible(token.text))
            continue
        red, green, blue = (round(a + (b - a) * token.strength) for a, b in zip(_PALE, _DEEP, strict=True))
        # Ink is set with the background, so that it reads on dark and light terminals alike.
        style = Style(color="#1c1b1a", bgcolor=f"rgb({red},{green},{blue})", underline=token.replaced)
        shown.append(visible(token.text), style)
    # A guard's replacement is no token's.
    return shown.append(visible(text[sum(len(token.text) for token in trace.tokens) :]))


def score_text(score: float) -> Text:
    """`0.42 ████░░░░░░`, coloured by how toxic it is."""
    from rich.text import Text

    from detox_guard.scorers.base import TOXIC_FROM

    full = round(score * 10)
    colour = "red" if score >= TOXIC_FROM else "yellow" if score >= TOXIC_FROM / 2 else "green"
    return Text.assemble((f"{score:.2f} ", "bold"), ("█" * full, colour), ("░" * (10 - full), "dim"))
