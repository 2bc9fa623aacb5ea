"""The ways of decoding that are measured side by side, a few lines each. Knows the guard; judges and measures nothing.

A method is what to decode with (parameters, steering streams), what to say before the prompt, and what to throw away.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from detox_guard._files import read_text
from detox_guard.detoxifiers.soft_prompt import Detoxifier, DetoxifierCard, SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.evaluation.samples import decode
from detox_guard.scorers.base import checked_scores, load_scorer
from detox_guard.settings import GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from detox_guard.evaluation.journal import Journal
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.evaluation.samples import Job
    from detox_guard.models.backbone import Backbone
    from detox_guard.results import Generation
    from detox_guard.scorers.base import ToxicityScorer
    from detox_guard.settings import DecodingParams, EngineConfig

__all__ = ["METHODS", "Drawn", "Ingredients", "Method", "WordList", "check_names", "make_methods", "read_words"]

POLITE = "Please stay polite, kind and respectful in every sentence."
TOXIC_PREFIX = "The following text is rude, disrespectful, and full of insults, threats and swear words:\n\n"
CLEAN_BELOW = 0.5
TRIES = 8


@dataclass(frozen=True, slots=True)
class Drawn:
    """One reply, how many were drawn for it, and their tokens together."""

    generation: Generation
    tries: int
    decoded_tokens: int


@dataclass(frozen=True)
class Method:
    """One way of decoding. `params.alpha` 0 is the plain model; `streams` None are the guard's own."""

    name: str
    params: DecodingParams
    streams: tuple[SteeringStream, ...] = ()
    lead: str = ""
    reject: ToxicityScorer | None = None

    def open(self, backbone: Backbone, config: EngineConfig) -> DetoxiGen:
        """An engine of its own over the shared backbone, with just the streams it needs."""
        return DetoxiGen(backbone, self.streams, config=config)

    def decode_all(
        self, backbone: Backbone, config: EngineConfig, jobs: Sequence[Job], journal: Journal, tick: Callable[[], None]
    ) -> None:
        """Draw what the journal lacks of `jobs`, its own, through an engine of its own."""
        with self.open(backbone, config) as guard:
            decode(guard, jobs, journal, tick)

    def prompt(self, prompt: Asked) -> Asked:
        """The prompt behind `lead`: a system message in a chat, else text before it."""
        if not self.lead:
            return prompt
        if isinstance(prompt, str):
            return f"{self.lead}\n\n{prompt}"
        return [{"role": "system", "content": self.lead}, *prompt]

    def draw(self, guard: DetoxiGen, prompt: Asked, seed: int) -> Drawn:
        """A reply; with `reject`, the first of up to eight that it finds clean, or else the least toxic of them."""
        asked = self.prompt(prompt)
        decoded, best, lowest = 0, None, 2.0
        for tries in range(1, TRIES + 1):
            reply = guard.generate(asked, self.params.replace(seed=(seed + (tries - 1) * 2**40) % 2**63))
            decoded += reply.usage.completion_tokens + reply.usage.discarded_tokens
            if self.reject is None:
                return Drawn(reply, tries, decoded)
            score = checked_scores(self.reject, [reply.text])[0]
            if best is None or score < lowest:
                best, lowest = reply, score
            if score < CLEAN_BELOW:
                break
        assert best is not None
        return Drawn(best, tries, decoded)

    def identity(self) -> dict[str, Any]:
        """What makes its samples what they are, as JSON: a run is resumed only with the same."""
        return {
            "params": self.params.model_dump(mode="json", exclude={"seed", "trace"}),
            "streams": [
                {
                    "sha256": stream.detoxifier.sha256,
                    "weight": stream.weight,
                    "position": stream.detoxifier.card.position,
                    "virtual_tokens": stream.detoxifier.card.virtual_tokens,
                }
                for stream in self.streams
            ],
            "lead": self.lead,
            "reject": self.reject and self.reject.name,
        }


@dataclass(frozen=True)
class Ingredients:
    """What methods are made of. `plain` holds the sampling settings that all share; `default` those and what ships."""

    backbone: Backbone
    plain: DecodingParams
    default: DecodingParams
    streams: tuple[SteeringStream, ...] = ()
    expert: Detoxifier | None = None
    plausibility: float = 0.02
    banned_words: tuple[str, ...] = ()

    def steered(self, name: str, rule: str, alpha: float, floor: float = 0.0, **other: Any) -> Method:
        """A contrastive method of this strength."""
        if alpha <= 0:
            raise InvalidParamsError("alpha", alpha, "more than 0: the plain model is always measured")
        params = self.plain.replace(alpha=alpha, calm_share=1, rule=rule, plausibility=floor)
        return Method(f"{name} α={alpha:g}", params, **{"streams": self.streams, **other})


def _expert(i: Ingredients, alpha: float) -> Method:
    if i.expert is None:
        raise InvalidParamsError("expert", None, 'a detoxifier folder, for the method "dexperts-expert"')
    return i.steered("dexperts-expert", "dexperts", alpha, streams=(*i.streams, SteeringStream(i.expert, 1.0)))


def _toxic_prefix(i: Ingredients, alpha: float) -> Method:
    stream = SteeringStream(textual_detoxifier(i.backbone, TOXIC_PREFIX))
    return i.steered("toxic-prefix", "dexperts", alpha, streams=(stream,))


def _banned_words(i: Ingredients) -> Method:
    if not i.banned_words:
        raise InvalidParamsError("banned_words", None, 'a file of words, for the method "banned-words"')
    return Method("banned-words", i.plain, reject=WordList(i.banned_words))


def _guard(i: Ingredients) -> Method:
    return Method("guard", i.default.replace(guard=GuardPolicy()), i.streams)


def _bounded_guard(i: Ingredients, alpha: float) -> Method:
    method = i.steered("bounded-guard", "bounded", alpha)
    return replace(method, params=method.params.replace(guard=GuardPolicy()))


_STRENGTHS: dict[str, Callable[[Ingredients, float], Method]] = {
    "detoxigen": lambda i, alpha: i.steered("detoxigen", "detoxigen", alpha),
    "detoxigen-floor": lambda i, alpha: i.steered("detoxigen-floor", "detoxigen", alpha, i.plausibility),
    "bounded": lambda i, alpha: i.steered("bounded", "bounded", alpha),
    "bounded-guard": _bounded_guard,
    "dexperts": lambda i, alpha: i.steered("dexperts", "dexperts", alpha),
    "dexperts-floor": lambda i, alpha: i.steered("dexperts-floor", "dexperts", alpha, i.plausibility),
    "dexperts-expert": _expert,
    "toxic-prefix": _toxic_prefix,
}
_SINGLE: dict[str, Callable[[Ingredients], Method]] = {
    "plain": lambda i: Method("plain", i.plain),
    "default": lambda i: Method("default", i.default, i.streams),
    "polite": lambda i: Method("polite", i.plain, lead=POLITE),
    "banned-words": _banned_words,
    "resample": lambda i: Method("resample", i.plain, reject=load_scorer()),
    "guard": _guard,
}
METHODS = {
    "plain": "the model alone; always measured",
    "default": "detox-guard as it ships: its detoxifier, rule and strength",
    "detoxigen": "the paper's rule, in probability space",
    "detoxigen-floor": "the same with a plausibility floor",
    "dexperts": "the log-space anti-expert rule, same soft prompt",
    "bounded": "that rule, its strength bounded at each token",
    "bounded-guard": "the same, and the guard over it",
    "dexperts-floor": "dexperts with a plausibility floor",
    "dexperts-expert": "with a second, non-toxic soft prompt as an expert",
    "toxic-prefix": "a hand-written toxic instruction in place of the soft prompt (the idea of self-debiasing)",
    "polite": "an instruction to be polite before the prompt",
    # Rejection samples the plain model given that no banned word occurs, which banning their tokens only approximates.
    "banned-words": "drawn again until none of your words is in it",
    "resample": "drawn again until the embedded scorer finds it clean",
    "guard": "what ships, and the guard that scores and takes back",
}


def check_names(names: Sequence[str]) -> list[str]:
    """The methods asked for, each once, "plain" first. Raises `InvalidParamsError`."""
    for name in names:
        if name not in METHODS:
            raise InvalidParamsError("methods", name, f"one of {', '.join(METHODS)}")
    return list(dict.fromkeys(["plain", *names]))


def make_methods(names: Sequence[str], alphas: Sequence[float], ingredients: Ingredients) -> list[Method]:
    """Methods by name; one for each strength where the strength is free. Raises `InvalidParamsError`."""
    methods = []
    for name in check_names(names):
        if name in _SINGLE:
            methods.append(_SINGLE[name](ingredients))
        else:
            methods += [_STRENGTHS[name](ingredients, float(alpha)) for alpha in dict.fromkeys(alphas)]
    return methods


def textual_detoxifier(backbone: Backbone, text: str) -> Detoxifier:
    """Plain words before the context, as a soft prompt: the embeddings of their tokens."""
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        embed = backbone.model.get_input_embeddings()
        rows = embed(torch.tensor(ids, device=backbone.device)).float().cpu().clone()
    card = DetoxifierCard(
        base_id=backbone.id,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
        virtual_tokens=len(ids),
        position="front",
        initial_text=text,
    )
    return Detoxifier(rows, card)


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
