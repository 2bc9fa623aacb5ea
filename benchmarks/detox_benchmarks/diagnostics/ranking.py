"""Does a detoxifier aim? Its log-ratio, log p_detox - log p_gen, along the replies of a run that was judged.

A detoxifier takes away what it tells apart: of two replies to one prompt it should favour the toxic one more, and it
should favour toxic words, not a style. Both are measured along what the backbone said by itself, the run's plain
replies, as its judges found them. Of several soft prompts it is what they push away from together, the sum of their
log-ratios by weight: with an expert, log p_detox - log p_expert::

    python -m detox_benchmarks rank out/toxic --detoxifier my-detoxifier --words words.txt

Knows stored runs and log-ratios; decodes nothing, judges nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from detox_benchmarks.diagnostics.context_kl import reply_contrast
from detox_benchmarks.methods import WordList, read_words
from detox_guard.errors import DataError
from detox_guard.evaluation.metrics import Bootstrap, Interval
from detox_guard.evaluation.run import prompt_of
from detox_guard.evaluation.store import load_run, stored_replies, stored_scores
from detox_guard.evaluation.summary import whole_judges
from detox_guard.evaluation.tables import Sheet, markdown, shown
from detox_guard.scorers.base import TOXIC_FROM
from detox_guard.text.prompts import TextStream, encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detox_guard.detoxifiers.soft_prompt import SteeringStream
    from detox_guard.models.backbone import Backbone

__all__ = ["Aim", "Kind", "Ranking", "kinds_of", "measure_aim", "rank", "run_ranking"]

Floats = npt.NDArray[np.float64]
FIRST, LISTED, OTHER, SIGN = KINDS = ("the first token", "listed words", "other words", "signs and spaces")


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one figure of a reply's log-ratios ("sum" or "largest") ranks the replies that a judge calls toxic.

    `within`: of the pairs of a toxic and a harmless reply to one prompt, the share in which the toxic one has more (a
    tie is half a pair), with a 95 % interval over prompts; `auc`: ROC-AUC over all replies. None without such pairs.
    """

    judge: str
    figure: str
    toxic: int
    replies: int
    within: Interval
    auc: float | None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of token: its share of all tokens, its mean log-ratio in nats (None without a token), and its share of the
    nats by which tokens are favoured, that is of the positive log-ratios."""

    name: str
    tokens: float
    mean: float | None
    favoured: float


@dataclass(frozen=True)
class Aim:
    """What `measure_aim` found."""

    streams: tuple[tuple[str, float], ...]
    """sha256 and weight of each soft prompt."""
    method: str
    rankings: tuple[Ranking, ...]
    kinds: tuple[Kind, ...]

    def markdown(self) -> str:
        """Two tables, to be pasted into docs."""
        names = " and ".join(f"{sha256[:12]} ({weight:+g})" for sha256, weight in self.streams)
        rankings = [
            [
                one.judge,
                one.figure,
                f"{one.toxic} of {one.replies}",
                shown(asdict(one.within), digits=2),
                "–" if one.auc is None else f"{one.auc:.2f}",
            ]
            for one in self.rankings
        ]
        kinds = [
            [k.name, f"{k.tokens:.1%}", "–" if k.mean is None else f"{k.mean:+.3f}", f"{k.favoured:.1%}"]
            for k in self.kinds
        ]
        heads = ["judge", "log-ratios", "toxic replies", "more in the toxic one of a pair", "ROC-AUC"]
        title = f"Log-ratios of {names} along the replies of `{self.method}`"
        others = ["tokens", "share", "mean log-ratio, nats", "share of what is favoured"]
        return markdown([Sheet(title, heads, rankings), Sheet("", others, kinds)])


def measure_aim(
    folder: Path,
    backbone: Backbone,
    streams: Sequence[SteeringStream],
    *,
    method: str = "plain",
    words: Sequence[str] = (),
) -> Aim:
    """Along all replies of one method of a whole run, each behind its own prompt; `words` are the listed ones, and
    `streams` those of `detox_guard.detoxifiers.soft_prompt.as_streams`.

    Raises `DataError` for a run that is not whole, that has no judge of toxicity or no such method, or that another
    model decoded.
    """
    run = load_run(folder)
    if method not in run["methods"]:
        raise DataError(f"{folder}: has no method {method!r}", hint=f"it has {', '.join(run['methods'])}")
    if (run["model"], run["revision"]) != (backbone.identity["model"], backbone.identity["revision"]):
        raise DataError(f"{folder}: is of {run['model']} ({run['revision']}), not of {backbone.id}")
    prompts = range(len(run["prompts"]))
    scores = stored_scores(folder)
    judges = [one for one in whole_judges(scores, [method], len(prompts)) if "scores" in scores[one, method, 0]]
    if not judges:
        raise DataError(f"{folder}: no judge of toxicity has seen all of it", hint="eval --rescore --judge adds one")
    replies = stored_replies(folder, run)
    listed = WordList(words) if words else None
    figures: dict[str, list[list[float]]] = {"sum": [], "largest": []}
    nats: list[float] = []
    kinds: list[str] = []
    for i in prompts:
        ids = [row["token_ids"] for row in replies[method, i]]
        context = encode_prompt(backbone, prompt_of(run, i))
        ratios = _away_from(backbone, streams, context, ids)
        figures["sum"].append([sum(row) for row in ratios])
        figures["largest"].append([max(row, default=0.0) for row in ratios])
        for own, row in zip(ids, ratios, strict=True):
            nats += row
            kinds += kinds_of(backbone, context, own, listed)
    rankings = tuple(
        rank(judge, figure, values, [scores[judge, method, i]["scores"] for i in prompts], seed=run["seed"])
        for judge in judges
        for figure, values in figures.items()
    )
    named = tuple((stream.detoxifier.sha256, stream.weight) for stream in streams)
    return Aim(named, method, rankings, _by_kind(np.array(nats), np.array(kinds)))


def _away_from(
    backbone: Backbone, streams: Sequence[SteeringStream], context: Sequence[int], replies: Sequence[Sequence[int]]
) -> list[list[float]]:
    """At each token of each reply how far the streams together push it away, nats a unit of alpha."""
    total = [torch.zeros(len(reply)) for reply in replies]
    for stream in streams:
        virtual = stream.soft_prompt.embeddings.to(backbone.device, backbone.dtype)
        found = reply_contrast(backbone, virtual, stream.soft_prompt.card.position, context, replies, first=True)
        total = [one - stream.weight * ratio for one, (_, ratio) in zip(total, found, strict=True)]
    return [one.tolist() for one in total]


def rank(
    judge: str, figure: str, values: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], *, seed: int = 0
) -> Ranking:
    """`values[prompt][sample]` against a judge's `scores` of the same replies; toxic is .5 or more."""
    won, pairs = [], []
    for own, judged in zip(values, scores, strict=True):
        up, down = _halves(own, judged)
        won.append(_won(up, down))
        pairs.append(len(up) * len(down))
    up, down = _halves([v for own in values for v in own], [s for judged in scores for s in judged])
    bootstrap = Bootstrap(len(pairs), seed=seed)
    within = bootstrap.figure(bootstrap.rate(won, pairs)).value
    auc = _won(up, down) / (len(up) * len(down)) if len(up) and len(down) else None
    return Ranking(judge, figure, len(up), len(up) + len(down), within, auc)


def kinds_of(backbone: Backbone, context: Sequence[int], reply: Sequence[int], listed: WordList | None) -> list[str]:
    """The kind of each token of a reply, of `KINDS`. A word's tokens are all of its kind; the first is a kind of its
    own, since it stands right behind the virtual tokens."""
    stream = TextStream(backbone.tokenizer, context)
    pieces = [stream.push(token_id) for token_id in reply]
    spans = listed.spans("".join(pieces)) if listed is not None else []
    kinds: list[str] = []
    end = 0
    for piece in pieces:
        start, end = end + len(piece) - len(piece.lstrip()), end + len(piece)
        if not kinds:
            kinds.append(FIRST)
        elif any(start < last and first < end for first, last in spans):
            kinds.append(LISTED)
        else:
            kinds.append(OTHER if any(sign.isalnum() for sign in piece) else SIGN)
    return kinds


def _by_kind(nats: Floats, kinds: npt.NDArray[np.str_]) -> tuple[Kind, ...]:
    favoured = np.maximum(nats, 0)
    found = []
    for name in KINDS:
        own = kinds == name
        mean = float(nats[own].mean()) if own.any() else None
        found.append(Kind(name, float(own.mean()), mean, float(favoured[own].sum() / max(favoured.sum(), 1e-12))))
    return tuple(found)


def _halves(values: Sequence[float], scores: Sequence[float]) -> tuple[Floats, Floats]:
    """The values of toxic and of other replies."""
    all_, toxic = np.array(values), np.array(scores) >= TOXIC_FROM
    return all_[toxic], all_[~toxic]


def _won(up: Floats, down: Floats) -> float:
    """Pairs that `up` wins; a tie is half a win."""
    down = np.sort(down)
    return float((np.searchsorted(down, up, "left") + np.searchsorted(down, up, "right")).sum() / 2)


def run_ranking(
    run: Path,
    *,
    detoxifier: str | None = None,
    expert: str | None = None,
    model: str | None = None,
    device: str | None = None,
    method: str = "plain",
    words: Path | None = None,
) -> Aim:
    """`measure_aim` of a run's folder: `expert` is of the detoxifier, trained on clean text; `words` a file of them."""
    listed = read_words(words) if words else ()
    load_run(run)  # before the model
    from detox_guard.detoxifiers.resolve import as_streams
    from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
    from detox_guard.models.load import load_backbone

    backbone = load_backbone(model, device=device)
    streams = as_streams(detoxifier, backbone)
    if expert:
        streams = as_streams([streams[0], SteeringStream(Detoxifier.load(expert), 1.0)], backbone)
    return measure_aim(run, backbone, streams, method=method, words=listed)
