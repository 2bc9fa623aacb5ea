"""A loaded model and the replies asked of it: loads with a spinner, decodes many prompts at once, keeps what came.

Knows `DetoxiGen` and progress bars; knows nothing of how replies are shown.
"""

from __future__ import annotations

import secrets
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard._progress import Progress
from detox_guard.cli.console import stderr_console
from detox_guard.errors import DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.results import Chunk, Generation
    from detox_guard.scorers.base import ToxicityScorer
    from detox_guard.settings import DecodingParams, EngineConfig
    from detox_guard.text.prompts import Prompt

__all__ = [
    "Exchange",
    "draw_seed",
    "load_model",
    "load_named_scorer",
    "loading_spinner",
    "needs_extra",
    "run_all",
    "spinner",
    "stdin_is_terminal",
]


@dataclass
class Exchange:
    """One prompt and what comes of it. `text` grows. At the end there is a `generation` or an `error`; neither if cut
    off."""

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


def load_model(
    model: str | None = None,
    detoxifiers: Sequence[str] | None = None,
    *,
    steered: bool = True,
    config: EngineConfig | None = None,
    **loading: Any,
) -> DetoxiGen:
    """`DetoxiGen.from_pretrained` with a spinner on stderr. Without `steered`, no detoxifier is looked for.

    `loading`: fields of `LoadOptions`.
    """
    with loading_spinner(model):
        from transformers.utils import logging

        logging.disable_progress_bar()
        from detox_guard.detoxigen import DetoxiGen

        detoxifier: Any = "auto" if steered else ()
        if detoxifiers and list(detoxifiers) != ["auto"]:
            detoxifier = list(detoxifiers)
        return DetoxiGen.from_pretrained(
            model,
            detoxifier=detoxifier,
            config=config,
            **loading,
        )


def load_named_scorer(name: str | None) -> ToxicityScorer:
    """The scorer, having scored something: one that cannot be loaded fails here, before anything is decoded."""
    from detox_guard.scorers.base import checked_scores, load_scorer

    scorer = load_scorer(name)
    if scorer.name != "embedded":
        with spinner(f"Loading {visible_name(scorer.name)}"):
            checked_scores(scorer, ["ready"])
    return scorer


def run_all(
    model: DetoxiGen,
    replies: Sequence[Exchange],
    *,
    words: str = "Decoding",
    quiet: bool = False,
    on_done: Callable[[Exchange], None] | None = None,
) -> None:
    """Decode all replies together, with a bar on stderr. `on_done` hears of each, in their order, as soon as it can.

    A reply that fails holds its error and hurts no other. On Ctrl-C the seats are freed, what was decoded so far is
    in `replies`, and `KeyboardInterrupt` is raised.
    """
    asked = [reply for reply in replies if not reply.done]
    told = chars = 0

    def tell() -> None:
        nonlocal told
        while on_done and told < len(replies) and replies[told].done:
            told += 1
            on_done(replies[told - 1])

    tell()  # those that had failed before they came here
    with (
        Progress(not quiet, passing=True) as bars,
        bars.stage(words, len(replies), len(replies) - len(asked)) as stage,
    ):

        def hear(index: int, chunk: Chunk) -> None:
            nonlocal chars
            asked[index].text += chunk.text
            chars += len(chunk.text)
            stage.say(f"{chars} characters")

        results = model.as_completed(
            [reply.prompt for reply in asked],
            [reply.params for reply in asked],
            return_exceptions=True,
            on_chunk=hear,
        )
        with closing(results):
            for index, result in results:
                if isinstance(result, DetoxGuardError):
                    asked[index].error = result
                else:
                    asked[index].generation = result
                stage.tick()
                tell()


@contextmanager
def loading_spinner(model: str | None) -> Iterator[None]:
    """A line on stderr while a model is loaded."""
    if model is None:
        from detox_guard.models.default import default_backbone_dir

        default_backbone_dir()  # has its own bar, and two at once would fight for the line
    with spinner(f"Loading {visible_name(model)}"):
        yield


@contextmanager
def needs_extra(name: str, doing: str, *, of: str = "detox-guard") -> Iterator[None]:
    """A package that is not there becomes one line that says what to install: an extra of `of`."""
    try:
        yield
    except ImportError as error:
        raise DetoxGuardError(f"{doing} needs more packages: {error}", hint=f"pip install '{of}[{name}]'") from error


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
