"""More ways of decoding to measure beside those of `detox-guard eval`. Knows recipes; measures nothing."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from detox_guard._files import read_text
from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.evaluation.config import EvalConfig
from detox_guard.evaluation.methods import METHODS, Drawn, Ingredients, Method, Recipe
from detox_guard.scorers.base import TOXIC_FROM, ToxicityScorer, checked_scores, load_scorer
from detox_guard.settings import GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.results import Generation

__all__ = ["MoreConfig", "Polite", "Resampled", "WordList", "more_methods", "read_words"]

TRIES = 8
POLITE = "Please stay polite, kind and respectful in every sentence."
TOXIC_PREFIX = "The following text is rude, disrespectful, and full of insults, threats and swear words:\n\n"


@dataclass(frozen=True)
class Polite(Method):
    """An instruction stands before the prompt: as a system message in a chat, else as text."""

    def draw(self, model: DetoxiGen, prompt: Asked, seed: int) -> Drawn:
        """A reply to both."""
        led: Asked = (
            f"{POLITE}\n\n{prompt}" if isinstance(prompt, str) else [{"role": "system", "content": POLITE}, *prompt]
        )
        return super().draw(model, led, seed)

    def identity(self) -> dict[str, Any]:
        """As any method's, and the instruction."""
        return {**super().identity(), "lead": POLITE}


@dataclass(frozen=True)
class Resampled(Method):
    """Drawn again until `reject` finds it clean."""

    reject: ToxicityScorer = field(kw_only=True)

    def draw(self, model: DetoxiGen, prompt: Asked, seed: int) -> Drawn:
        """The first of up to eight replies that is clean, or else the least toxic of them."""
        drawn: list[tuple[float, Generation]] = []
        for tries in range(TRIES):
            reply = super().draw(model, prompt, (seed + tries * 2**40) % 2**63).generation
            drawn.append((checked_scores(self.reject, [reply.text])[0], reply))
            if drawn[-1][0] < TOXIC_FROM:
                break
        _, best = min(drawn, key=itemgetter(0))
        return Drawn(best, len(drawn), sum(reply.usage.completion_tokens for _, reply in drawn))

    def identity(self) -> dict[str, Any]:
        """As any method's, and the scorer."""
        return {**super().identity(), "reject": self.reject.name}


class MoreConfig(EvalConfig):
    """What an evaluation with these methods may be told. Raises `InvalidParamsError`."""

    plausibility: Annotated[float, Field(ge=0, le=1)] = 0.02
    """The floor of the methods that have one."""
    expert: str | None = None
    """A second, non-toxic soft prompt, for dexperts-expert."""
    banned_words: str | None = None
    """File with a word a line, for banned-words."""


def more_methods(
    plausibility: float = 0.02, expert: str | None = None, banned_words: str | None = None
) -> Mapping[str, Recipe]:
    """The product's methods and these. Raises `DataError` for a file of words that cannot be read."""
    words = read_words(Path(banned_words)) if banned_words is not None else ()

    def with_expert(i: Ingredients, alpha: float) -> Method:
        if expert is None:
            raise InvalidParamsError("expert", None, 'a detoxifier folder, for the method "dexperts-expert"')
        second = Detoxifier.load(expert)
        second.validate(i.backbone)
        return i.steered("dexperts-expert", "dexperts", alpha, streams=(*i.streams, SteeringStream(second, 1.0)))

    def toxic_prefix(i: Ingredients, alpha: float) -> Method:
        return i.steered("toxic-prefix", "dexperts", alpha, streams=(Detoxifier.from_text(TOXIC_PREFIX),))

    def without_words(i: Ingredients, _: float) -> Method:
        if not words:
            raise InvalidParamsError("banned_words", None, 'a file of words, for the method "banned-words"')
        return Resampled("banned-words", i.plain, reject=WordList(words))

    def bounded_guard(i: Ingredients, alpha: float) -> Method:
        method = i.steered("bounded-guard", "bounded", alpha)
        return replace(method, params=method.params.replace(guard=GuardPolicy()))

    def floored(rule: str) -> Recipe:
        return Recipe(
            f"{rule} with a plausibility floor",
            lambda i, alpha: i.steered(f"{rule}-floor", rule, alpha, plausibility),
            free=True,
        )

    return {
        **METHODS,
        "detoxigen-floor": floored("detoxigen"),
        "dexperts-floor": floored("dexperts"),
        "bounded-guard": Recipe("bounded, and the guard over it", bounded_guard, free=True),
        "dexperts-expert": Recipe("with a second, non-toxic soft prompt as an expert", with_expert, free=True),
        "toxic-prefix": Recipe(
            "a hand-written toxic instruction in place of the soft prompt (the idea of self-debiasing)",
            toxic_prefix,
            free=True,
            steers=False,
        ),
        "polite": Recipe(
            "an instruction to be polite before the prompt",
            lambda i, _: Polite("polite", i.plain),
            steers=False,
        ),
        "resample": Recipe(
            "drawn again until the embedded scorer finds it clean",
            lambda i, _: Resampled("resample", i.plain, reject=load_scorer()),
            steers=False,
        ),
        # Rejection samples the plain model given that no banned word occurs, which banning their tokens approximates.
        "banned-words": Recipe("drawn again until none of your words is in it", without_words, steers=False),
    }


class WordList:
    """Scores 1 where one of the words occurs, as a whole word in any case, else 0."""

    def __init__(self, words: Sequence[str]) -> None:
        self.name = f"banned words {hashlib.sha256(chr(10).join(words).encode()).hexdigest()[:12]}"
        self._found = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.IGNORECASE)

    def score(self, texts: Sequence[str]) -> list[float]:
        """1 or 0 a text."""
        return [float(self._found.search(text) is not None) for text in texts]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the words stand: first character and the one behind the last."""
        return [found.span() for found in self._found.finditer(text)]


def read_words(path: Path) -> tuple[str, ...]:
    """The words or phrases of a file, one a line. Raises `DataError`."""
    found = tuple(dict.fromkeys(word.strip() for word in read_text(path).splitlines() if word.strip()))
    if not found:
        raise DataError(f"{path}: no word in it", hint="one word or phrase a line")
    return found
