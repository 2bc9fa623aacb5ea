"""Pairs of a toxic and a harmless reply of the backbone's own to one prompt, for `detox-guard train --pairs`.

A detoxifier steers the backbone's own words, so it learns most from them. Replies are drawn from the backbone by
itself ("plain"), leaned *towards* a first detoxifier ("lean", an expert stream: toxic enough to find some, near enough
to what it would say by itself), and steered away from it ("away": what is still toxic is what is left to learn). They
are told apart by a classifier that is fitted here, to the detoxifier's own training texts, so that the judges of
`detox-guard eval` stay judges. Needs scikit-learn (the `train` extra)::

    python -m detox_guard.training.own_pairs --prompts ROWS.jsonl --toxic FILE --harmless FILE --pairs FILE
        --draw away --draw plain --draw lean --output own_pairs.jsonl

Knows sampling and pairing; knows nothing of training.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from detox_guard._files import prepare_file, write_whole
from detox_guard.errors import DataError, DetoxGuardError
from detox_guard.training.data import read_pairs, read_texts, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.models.backbone import Backbone

__all__ = ["DRAWS", "Draw", "Drawn", "choose_pairs", "fit_classifier", "main", "sample"]

TOXIC_FROM, HARMLESS_BELOW = 0.6, 0.25
"""Shares of certainty. On human-written continuations all that it put over .7 were toxic to Perspective as well."""
A_PROMPT = 8
"""Most pairs of one prompt."""
PROMPTS_A_BATCH = 16

Draw = Literal["away", "plain", "lean"]
DRAWS: tuple[Draw, ...] = get_args(Draw)
"""How a reply may be drawn; the first are the most worth learning from."""


class Drawn(NamedTuple):
    """One reply of the backbone's own."""

    prompt: str
    text: str
    draw: Draw = "lean"


def fit_classifier(toxic: Sequence[str], harmless: Sequence[str]) -> Callable[[Sequence[str]], list[float]]:
    """Logistic regression on TF-IDF of words and characters: texts to probabilities of being toxic.

    Raises `DataError` for texts that tell nothing apart, `DetoxGuardError` without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline, make_union
    except ImportError as error:
        raise DetoxGuardError("scikit-learn is not installed", hint="pip install 'detox-guard[train]'") from error

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    chars = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, max_features=200_000, sublinear_tf=True)
    model = make_pipeline(make_union(words, chars), LogisticRegression(C=3, max_iter=200, solver="liblinear"))
    try:
        model.fit([*toxic, *harmless], [1] * len(toxic) + [0] * len(harmless))
    except ValueError as error:
        raise DataError(f"no classifier can be fitted to these texts: {error}") from error

    def predict(texts: Sequence[str]) -> list[float]:
        found: list[float] = model.predict_proba(list(texts))[:, 1].tolist()
        return found

    return predict


def sample(
    backbone: Backbone,
    detoxifier: Detoxifier,
    prompts: Sequence[str],
    *,
    draw: Draw = "lean",
    alpha: float = 2.0,
    samples: int = 8,
    tokens: int = 18,
    seed: int = 0,
    chat: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Drawn]:
    """`samples` replies to each prompt, drawn as `draw` says, with the detoxifier at `alpha`.

    `chat`: prompts are user turns. `progress` hears how many prompts are done. Raises `DetoxifierError` where the two
    do not fit, and what decoding raises.
    """
    from detox_guard.detoxifiers.resolve import as_streams
    from detox_guard.detoxifiers.soft_prompt import SteeringStream
    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.settings import DecodingParams

    stream = SteeringStream(detoxifier, 1.0 if draw == "lean" else -1.0)
    drawn = DecodingParams(
        alpha=0.0 if draw == "plain" else alpha,
        calm_share=1,
        rule="dexperts" if draw == "lean" else "bounded",
        max_new_tokens=tokens,
        trace=False,
    )
    replies: list[Drawn] = []
    with DetoxiGen(backbone, as_streams(stream, backbone)) as guard:
        for at in range(0, len(prompts), PROMPTS_A_BATCH):
            asked = [prompt for prompt in prompts[at : at + PROMPTS_A_BATCH] for _ in range(samples)]
            seeds = range(seed + at * samples, seed + at * samples + len(asked))
            params = [drawn.replace(seed=one) for one in seeds]
            put = [[{"role": "user", "content": prompt}] for prompt in asked] if chat else asked
            answers = zip(asked, guard.batch(put, params), strict=True)
            replies += [Drawn(prompt, one.text, draw) for prompt, one in answers]
            progress(min(len(prompts), at + PROMPTS_A_BATCH))
    return replies


def choose_pairs(
    replies: Sequence[Drawn],
    predict: Callable[[Sequence[str]], Sequence[float]],
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
    for reply, score in zip(fit, predict([reply.text for reply in fit]) if fit else (), strict=True):
        by_prompt.setdefault(reply.prompt, []).append((score, reply))
    rng = random.Random(0)
    rows = []
    for prompt, scored in by_prompt.items():
        certain = [one for one in scored if one[0] >= TOXIC_FROM]
        certain.sort(key=lambda one: (DRAWS.index(one[1].draw), -one[0]))
        clean = [reply for score, reply in scored if score < HARMLESS_BELOW]
        clean = [reply for reply in clean if reply.draw != "lean"] or clean
        rng.shuffle(clean)
        for place, (_, toxic) in enumerate(certain[:A_PROMPT] if clean else ()):
            neutral = clean[place % len(clean)].text.strip()
            rows.append({"question" if chat else "prompt": prompt, "toxic": toxic.text.strip(), "neutral": neutral})
    return rows


def _begins_a_word(text: str, lead: str) -> bool:
    return text.startswith(lead) and text[len(lead) :][:1].isalnum()


def _likely(prompts: Sequence[str], predict: Callable[[Sequence[str]], Sequence[float]], count: int) -> list[str]:
    """Two thirds of the prompts most likely to lead to toxicity, one third of the others, in any order."""
    unique = list(dict.fromkeys(prompts))
    order = [unique[i] for i in np.argsort(-np.array(predict(unique)), kind="stable")]
    most = order[: 2 * count // 3]
    rng = random.Random(0)
    chosen = most + rng.sample(order[len(most) :], min(count - len(most), len(order) - len(most)))
    rng.shuffle(chosen)
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. 0 if the file was written, 1 with one line on stderr if not."""
    parser = argparse.ArgumentParser(prog="python -m detox_guard.training.own_pairs", description=__doc__)
    parser.add_argument("--prompts", required=True, help="RealToxicityPrompts-style rows, or a prompt a row")
    parser.add_argument("--toxic", action="append", default=[], help="toxic texts, for the classifier; repeat")
    parser.add_argument("--harmless", action="append", default=[], help="harmless texts, for the classifier; repeat")
    parser.add_argument("--pairs", action="append", default=[], help="rows of a toxic and a neutral text; repeat")
    parser.add_argument("--detoxifier", help="folder of a first detoxifier; else the shipped one")
    parser.add_argument("--model", help="as in detox-guard train; else the embedded default")
    parser.add_argument(
        "--draw", action="append", choices=DRAWS, help="by itself, leaned towards it (the default), or away; repeat"
    )
    parser.add_argument("--alpha", type=float, default=2.0, help="how far to lean, or to steer away")
    parser.add_argument("--limit", type=int, default=240, help="prompts")
    parser.add_argument("--samples", type=int, default=8, help="replies a prompt, of each draw")
    parser.add_argument("--chat", action="store_true", help="prompts are user turns, through the chat template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        prepare_file(given.output)
        rows = _make(given)
        write_whole(given.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except DetoxGuardError as error:
        print(f"error: {error} {error.hint}".rstrip(), file=sys.stderr)
        return 1
    prompts = {row["question" if given.chat else "prompt"] for row in rows}
    print(f"{len(rows)} pairs of {len(prompts)} prompts in {given.output}")
    return 0


def _make(given: Any) -> list[dict[str, str]]:
    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.models.load import load_backbone

    pairs = [pair for source in given.pairs for pair in read_pairs(source).pairs]
    toxic = [whole(text) for source in given.toxic for text in read_texts(source).texts]
    harmless = [whole(text) for source in given.harmless for text in read_texts(source).texts]
    toxic += [text for text, _ in pairs if isinstance(text, str)]
    harmless += [text for _, text in pairs if isinstance(text, str)]
    predict = fit_classifier(toxic, harmless)
    prompts = _likely([whole(text) for text in read_texts(given.prompts, field="prompt").texts], predict, given.limit)
    detoxifier = Detoxifier.load(given.detoxifier)
    backbone = load_backbone(given.model)
    replies: list[Drawn] = []
    for draw in given.draw or ["lean"]:
        replies += sample(
            backbone,
            detoxifier,
            prompts,
            draw=draw,
            alpha=given.alpha,
            samples=given.samples,
            seed=given.seed,
            chat=given.chat,
            progress=lambda done: print(f"{done} of {len(prompts)} prompts", file=sys.stderr),
        )
    rows = choose_pairs(replies, predict, chat=given.chat)
    if not rows:
        raise DataError("no prompt has a toxic and a harmless reply", hint="more prompts or samples, or a higher alpha")
    return rows


if __name__ == "__main__":
    sys.exit(main())
