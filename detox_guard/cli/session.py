"""A loaded model and the replies asked of it: loads with a spinner, decodes many prompts at once, keeps what came.

Knows `DetoxiGen` and progress bars; knows nothing of how replies are shown.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard._progress import Progress
from detox_guard.cli.console import stderr_console
from detox_guard.errors import DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.results import Generation
    from detox_guard.scorers.linear import ToxicityScorer
    from detox_guard.settings import DecodingParams, EngineConfig
    from detox_guard.text.prompts import Prompt

__all__ = [
    "Reply",
    "draw_seed",
    "load_guard",
    "load_named_scorer",
    "needs_extra",
    "run_all",
    "spinner",
    "stdin_is_terminal",
]

_AT_ONCE = 256
"""Requests handed to the engine at a time; its queue takes more, its batch fewer."""


@dataclass
class Reply:
    """One prompt under way. `text` grows; at the end there is a `generation` or an `error`, or neither if cut off."""

    prompt: Prompt
    params: DecodingParams
    text: str = ""
    generation: Generation | None = None
    error: DetoxGuardError | None = None

    @property
    def done(self) -> bool:
        return self.generation is not None or self.error is not None


def draw_seed() -> int:
    """A fresh seed, short enough to be typed again."""
    return secrets.randbits(31)


def load_guard(
    model: str | None = None,
    detoxifiers: Sequence[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    steered: bool = True,
    config: EngineConfig | None = None,
) -> DetoxiGen:
    """`DetoxiGen.from_pretrained` with a spinner on stderr. Without `steered`, no detoxifier is looked for."""
    if model is None:
        from detox_guard.models.default import default_backbone_dir

        default_backbone_dir()  # has its own bar, and two at once would fight for the line
    with spinner(f"Loading {visible_name(model)}"):
        from transformers.utils import logging

        logging.disable_progress_bar()
        from detox_guard.detoxigen import DetoxiGen

        detoxifier: Any = list(detoxifiers) if detoxifiers else (None if steered else ())
        return DetoxiGen.from_pretrained(
            model,
            detoxifier=detoxifier,
            device=device,
            dtype=None if dtype == "auto" else dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            config=config,
        )


def load_named_scorer(name: str | None) -> ToxicityScorer:
    """The scorer, having scored something: one that cannot be loaded fails here, before anything is decoded."""
    from detox_guard.scorers.linear import checked_scores, load_scorer

    scorer = load_scorer(name)
    if scorer.name != "embedded":
        with spinner(f"Loading {visible_name(scorer.name)}"):
            checked_scores(scorer, ["ready"])
    return scorer


def run_all(
    guard: DetoxiGen,
    replies: Sequence[Reply],
    *,
    words: str = "Decoding",
    quiet: bool = False,
    on_done: Callable[[Reply], None] | None = None,
) -> None:
    """Decode all replies together, with a bar on stderr. `on_done` hears of each, in their order, as soon as it can.

    A reply that fails holds its error and hurts no other. On Ctrl-C the seats are freed, what was decoded so far is
    in `replies`, and `KeyboardInterrupt` is raised.
    """
    done, chars = sum(reply.done for reply in replies), 0
    with Progress(not quiet, passing=True) as bars, bars.stage(words, len(replies), done) as stage:

        def tick(more_chars: int, more_done: int) -> None:
            nonlocal chars
            chars += more_chars
            stage.say(f"{chars} characters")
            stage.tick(more_done)

        asyncio.run(_run_all(guard, replies, tick, on_done))


async def _run_all(
    guard: DetoxiGen,
    replies: Sequence[Reply],
    tick: Callable[[int, int], None],
    on_done: Callable[[Reply], None] | None,
) -> None:
    gate = asyncio.Semaphore(_AT_ONCE)
    told = 0

    def tell() -> None:
        nonlocal told
        while on_done and told < len(replies) and replies[told].done:
            told += 1
            on_done(replies[told - 1])

    async def one(reply: Reply) -> None:
        async with gate:
            try:
                async with aclosing(guard.astream(reply.prompt, reply.params)) as chunks:
                    async for chunk in chunks:
                        reply.text += chunk.text
                        reply.generation = chunk.generation
                        tick(len(chunk.text), 0)
            except DetoxGuardError as error:
                reply.error = error
        tick(0, 1)
        tell()

    tell()  # those that had failed before they came here
    await asyncio.gather(*(one(reply) for reply in replies if not reply.done))


@contextmanager
def needs_extra(name: str, doing: str) -> Iterator[None]:
    """A package that is not there becomes one line that says what to install."""
    try:
        yield
    except ImportError as error:
        raise DetoxGuardError(
            f"{doing} needs more packages: {error}", hint=f"pip install 'detox-guard[{name}]'"
        ) from error


@contextmanager
def spinner(words: str) -> Iterator[None]:
    """A line on stderr while something goes on; none where stderr is no terminal."""
    console = stderr_console()
    if not console.is_terminal:
        yield
        return
    with console.status(f"[dim]{words} …", spinner="dots"):
        yield


def visible_name(model: str | None) -> str:
    """What to call a model in a line on the terminal: square brackets are rich's own."""
    return (model or "the default model").replace("[", "(")


def stdin_is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
