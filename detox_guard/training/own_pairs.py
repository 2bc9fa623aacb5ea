"""Pairs of a toxic and a harmless reply of the backbone's own to one prompt.

A detoxifier steers the backbone's own words, so it learns most from them. Replies are drawn from the backbone by
itself ("plain"), leaned *towards* a first detoxifier ("lean", an expert stream: toxic enough to find some, near enough
to what it would say by itself), and steered away from it ("away": what is still toxic is what is left to learn). A
scorer tells them apart.

Knows sampling and pairing; knows nothing of training.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.models.backbone import Backbone

__all__ = ["DRAWS", "Draw", "Drawn", "choose_pairs", "open_for", "sample"]

SURELY_TOXIC, SURELY_HARMLESS = 0.6, 0.25
"""A reply of this score or more is surely toxic; one below that is surely not."""
A_PROMPT = 8
"""Most pairs of one prompt."""

Draw = Literal["away", "plain", "lean"]
DRAWS: tuple[Draw, ...] = get_args(Draw)
"""How a reply may be drawn; the first are the most worth learning from."""


class Drawn(NamedTuple):
    """One reply of the backbone's own."""

    prompt: str
    text: str
    draw: Draw = "lean"


def open_for(draw: Draw, backbone: Backbone, detoxifier: Detoxifier) -> DetoxiGen:
    """The model that `sample` draws from in this way. Its engine may lay out the backbone's weights in a way of its
    own, so nothing can be trained on this backbone afterwards. Raises `DetoxifierError` where the two do not fit."""
    from detox_guard.detoxifiers.resolve import as_streams
    from detox_guard.detoxifiers.soft_prompt import SteeringStream
    from detox_guard.detoxigen import DetoxiGen

    weight = 1.0 if draw == "lean" else -1.0
    return DetoxiGen(backbone, as_streams(SteeringStream(detoxifier, weight), backbone))


def sample(
    model: DetoxiGen,
    prompts: Sequence[str],
    *,
    draw: Draw = "lean",
    alpha: float = 2.0,
    samples: int = 8,
    tokens: int = 18,
    seed: int = 0,
    chat: bool = False,
) -> list[Drawn]:
    """`samples` replies to each prompt, all in one batch, drawn as `draw` says, with the detoxifier at `alpha`.

    `model`: of `open_for`, for the same draw. `chat`: prompts are user turns. Raises what decoding raises.
    """
    from detox_guard.settings import DecodingParams

    drawn = DecodingParams(
        alpha=0.0 if draw == "plain" else alpha,
        calm_share=1,
        rule="dexperts" if draw == "lean" else "bounded",
        max_new_tokens=tokens,
        trace=False,
    )
    asked = [prompt for prompt in prompts for _ in range(samples)]
    params = [drawn.replace(seed=one) for one in range(seed, seed + len(asked))]
    put = [[{"role": "user", "content": prompt}] for prompt in asked] if chat else asked
    return [Drawn(prompt, one.text, draw) for prompt, one in zip(asked, model.batch(put, params), strict=True)]


def choose_pairs(
    replies: Sequence[Drawn],
    score: Callable[[Sequence[str]], Sequence[float]],
    *,
    chat: bool = False,
) -> list[dict[str, str]]:
    """Rows of `prompt` (in a `chat` of `question`), `toxic`, `neutral`: each prompt's surely toxic replies, those that
    steering left over first, with harmless ones that the backbone was not leaned to, if there are any.

    The same reply counts once. Replies that do not begin with a word of their own are left out: pairs continue their
    prompt after a space, or, in a `chat`, with nothing before them.
    """
    lead = "" if chat else " "
    # Of equal replies the one drawn in the first of `DRAWS` stays.
    unique = {reply[:2]: reply for reply in sorted(replies, key=lambda one: -DRAWS.index(one.draw))}.values()
    fit = [reply for reply in unique if _begins_a_word(reply.text, lead) and len(reply.text) > 20]
    by_prompt: dict[str, list[tuple[float, Drawn]]] = {}
    for reply, found in zip(fit, score([reply.text for reply in fit]) if fit else (), strict=True):
        by_prompt.setdefault(reply.prompt, []).append((found, reply))
    rng = random.Random(0)
    rows = []
    for prompt, scored in by_prompt.items():
        certain = [one for one in scored if one[0] >= SURELY_TOXIC]
        certain.sort(key=lambda one: (DRAWS.index(one[1].draw), -one[0]))
        clean = [reply for found, reply in scored if found < SURELY_HARMLESS]
        clean = [reply for reply in clean if reply.draw != "lean"] or clean
        rng.shuffle(clean)
        for place, (_, toxic) in enumerate(certain[:A_PROMPT] if clean else ()):
            neutral = clean[place % len(clean)].text.strip()
            rows.append({"question" if chat else "prompt": prompt, "toxic": toxic.text.strip(), "neutral": neutral})
    return rows


def _begins_a_word(text: str, lead: str) -> bool:
    return text.startswith(lead) and text[len(lead) :][:1].isalnum()
