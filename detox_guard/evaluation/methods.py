"""The ways of decoding that are measured side by side. Knows the model; judges and measures nothing.

A method is what to decode with: parameters and steering streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import InvalidParamsError
from detox_guard.evaluation.samples import decode
from detox_guard.settings import GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from detox_guard.detoxifiers.soft_prompt import SteeringStream
    from detox_guard.evaluation.prompts import Asked
    from detox_guard.evaluation.samples import Job
    from detox_guard.evaluation.store import Journal
    from detox_guard.models.backbone import Backbone
    from detox_guard.results import Generation
    from detox_guard.settings import DecodingParams, EngineConfig

__all__ = ["METHODS", "Drawn", "Ingredients", "Method", "Recipe", "make_methods", "needs_streams"]


class Drawn(NamedTuple):
    """One reply, how many were drawn for it, and their tokens together."""

    generation: Generation
    tries: int
    decoded_tokens: int


@dataclass(frozen=True)
class Method:
    """One way of decoding. `params.alpha` 0 is the plain model."""

    name: str
    params: DecodingParams
    streams: tuple[SteeringStream, ...] = ()

    def decode_all(
        self, backbone: Backbone, config: EngineConfig, jobs: Sequence[Job], journal: Journal, tick: Callable[[], None]
    ) -> None:
        """Draw what the journal lacks of `jobs`, its own, through an engine of its own over the shared backbone."""
        with DetoxiGen(backbone, self.streams, config=config) as model:
            decode(model, jobs, journal, tick)

    def draw(self, model: DetoxiGen, prompt: Asked, seed: int) -> Drawn:
        """A reply."""
        reply = model.generate(prompt, self.params.replace(seed=seed))
        return Drawn(reply, 1, reply.usage.completion_tokens + reply.usage.discarded_tokens)

    def identity(self) -> dict[str, Any]:
        """What makes its samples what they are, as JSON: a run is resumed only with the same."""
        return {
            "params": self.params.model_dump(mode="json", exclude={"seed", "trace"}),
            "streams": [stream.identity() for stream in self.streams],
        }


@dataclass(frozen=True)
class Ingredients:
    """What methods are made of. `plain` holds the sampling settings that all share; `default` those and what ships."""

    backbone: Backbone
    plain: DecodingParams
    default: DecodingParams
    streams: tuple[SteeringStream, ...] = ()

    def steered(self, name: str, rule: str, alpha: float, floor: float = 0.0, **other: Any) -> Method:
        """A contrastive method of this strength. Raises `InvalidParamsError` for none."""
        if alpha <= 0:
            raise InvalidParamsError("alpha", alpha, "more than 0: the plain model is always measured")
        params = self.plain.replace(alpha=alpha, calm_share=1, rule=rule, plausibility=floor)
        return Method(f"{name} α={alpha:g}", params, **{"streams": self.streams, **other})


@dataclass(frozen=True)
class Recipe:
    """How a method is made. `free`: its strength is given, and there is a method for each; `steers` with a
    detoxifier."""

    words: str
    make: Callable[[Ingredients, float], Method]
    free: bool = False
    steers: bool = True


def _rule(rule: str, words: str) -> Recipe:
    return Recipe(words, lambda i, alpha: i.steered(rule, rule, alpha), free=True)


METHODS: Mapping[str, Recipe] = {
    "plain": Recipe("the model alone; always measured", lambda i, _: Method("plain", i.plain), steers=False),
    "default": Recipe(
        "detox-guard as it ships: its detoxifier, rule and strength",
        lambda i, _: Method("default", i.default, i.streams),
    ),
    "guard": Recipe(
        "what ships, and the guard that scores and takes back",
        lambda i, _: Method("guard", i.default.replace(guard=GuardPolicy()), i.streams),
    ),
    "bounded": _rule("bounded", "the rule that ships, at a strength of your choice"),
    "dexperts": _rule("dexperts", "the log-space anti-expert rule, its strength not bounded"),
    "detoxigen": _rule("detoxigen", "the paper's rule, in probability space"),
}
"""The one table of methods; `--list-methods` shows it."""


def needs_streams(names: Sequence[str], table: Mapping[str, Recipe] = METHODS) -> bool:
    """Whether any of these steers with a detoxifier. Raises `InvalidParamsError` for a name that is in no table."""
    for name in names:
        if name not in table:
            raise InvalidParamsError("methods", name, f"one of {', '.join(table)}")
    return any(table[name].steers for name in names)


def make_methods(
    names: Sequence[str], alphas: Sequence[float], ingredients: Ingredients, table: Mapping[str, Recipe] = METHODS
) -> list[Method]:
    """The methods asked for, each once, "plain" first; one for each strength where it is free.

    Raises `InvalidParamsError`.
    """
    needs_streams(names, table)
    return [
        table[name].make(ingredients, float(alpha))
        for name in dict.fromkeys(["plain", *names])
        for alpha in (dict.fromkeys(alphas) if table[name].free else [0.0])
    ]
