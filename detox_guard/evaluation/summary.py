"""From stored samples and scores to figures: by prompt class and category, by method, with paired intervals.

Knows the rows of `samples` and of the score journal; knows no model and no files. See `tables` for what it returns.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from detox_guard.evaluation.metrics import BROKEN_PERPLEXITY, Bootstrap, distinct_n, junk, repeats, toxicity
from detox_guard.evaluation.prompts import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from detox_guard.evaluation.metrics import Estimates

    Replies = Mapping[tuple[str, int], list[dict[str, Any]]]
    Scores = Mapping[tuple[Any, ...], dict[str, Any]]

__all__ = ["DROP_FROM", "summarize", "whole_judges"]

DROP_FROM = 1e4
"""Perplexities of single continuations from here on are left out of the mean, and counted."""
STEPS = 256


def summarize(run: Mapping[str, Any], replies: Replies, scores: Scores) -> dict[str, Any]:
    """The whole of `summary.json`. Methods whose samples are not complete are left out, and so are judges that have
    not judged every method; "plain" comes first and is what the others are compared with."""
    prompts = run["prompts"]
    whole = [m for m in run["methods"] if all((m, i) in replies for i in range(len(prompts)))]
    judges = whole_judges(scores, whole, len(prompts))
    known = [c for c in CLASSES if any(c in prompt["classes"] for prompt in prompts)]
    categories = sorted({category for prompt in prompts for category in prompt["categories"]})
    groups = [("class", name, [i for i, p in enumerate(prompts) if name in p["classes"]]) for name in known]
    groups += [("category", name, [i for i, p in enumerate(prompts) if name in p["categories"]]) for name in categories]
    return {
        **{key: value for key, value in run.items() if key != "prompts"},
        "judges": [judge for judge in judges if "scores" in scores[judge, whole[0], 0]],
        "lm_judges": [judge for judge in judges if "nll" in scores[judge, whole[0], 0]],
        "groups": [
            {"kind": kind, "name": name, "prompts": len(at), "methods": _group(at, whole, judges, replies, scores, run)}
            for kind, name, at in groups
        ],
        "along": {method: _along(method, replies) for method in whole},
        "ms_per_token": {method: _ms_per_token(method, replies) for method in whole},
    }


def whole_judges(scores: Scores, methods: Sequence[str], prompts: int) -> list[str]:
    """Those who have judged every prompt of all these methods."""
    asked = [(method, i) for method in methods for i in range(prompts)]
    return [judge for judge in dict.fromkeys(key[0] for key in scores) if all((judge, *at) in scores for at in asked)]


def _group(
    at: list[int],
    methods: Sequence[str],
    judges: Sequence[str],
    replies: Replies,
    scores: Scores,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    bootstrap = Bootstrap(len(at), seed=run["seed"])
    estimates = [
        _estimates([replies[m, i] for i in at], {j: [scores[j, m, i] for i in at] for j in judges}, bootstrap)
        for m in methods
    ]
    return {
        m: {name: asdict(bootstrap.figure(own[name], estimates[0].get(name) if n else None)) for name in own}
        for n, (m, own) in enumerate(zip(methods, estimates, strict=True))
    }


def _estimates(
    replies: list[list[dict[str, Any]]], scores: dict[str, list[dict[str, Any]]], bootstrap: Bootstrap
) -> dict[str, Estimates]:
    """Every figure of one method on one group, by name; a judge's are `name:figure`."""
    found: dict[str, Estimates] = {}
    broken = [[repeats(one["token_ids"]) or junk(one["text"]) for one in many] for many in replies]
    for judge, rows in scores.items():
        if "scores" in rows[0]:
            for name, value in toxicity(np.array([row["scores"] for row in rows]), bootstrap).items():
                found[f"{judge}:{name}"] = value
            continue
        perplexities = [
            [math.exp(min(nll / n, 700)) if n else None for nll, n in zip(row["nll"], row["tokens"], strict=True)]
            for row in rows
        ]
        known = [[value for value in many if value is not None] for many in perplexities]
        kept = [[value for value in many if value < DROP_FROM] for many in known]
        found[f"{judge}:perplexity"] = bootstrap.rate([sum(many) for many in kept], [len(many) for many in kept])
        found[f"{judge}:perplexity_dropped"] = bootstrap.rate(
            [len(a) - len(k) for a, k in zip(known, kept, strict=True)], [len(many) for many in replies]
        )
        if judge == "backbone":
            broken = [
                [bad or (ppl or 0.0) > BROKEN_PERPLEXITY for bad, ppl in zip(some, many, strict=True)]
                for some, many in zip(broken, perplexities, strict=True)
            ]

    def each(value: Callable[[dict[str, Any]], float], over: Callable[[dict[str, Any]], float] = lambda _: 1.0) -> Any:
        """Sum of one value of the samples over the sum of another."""
        return bootstrap.rate(
            [sum(map(value, many)) for many in replies],
            [sum(map(over, many)) for many in replies],
        )

    def tokens(one: dict[str, Any]) -> float:
        return len(one["token_ids"])

    for n in (1, 2, 3):
        grams = [distinct_n([one["text"] for one in many], n) for many in replies]
        found[f"distinct_{n}"] = bootstrap.rate([g or 0.0 for g in grams], [g is not None for g in grams])
    found["degenerate"] = bootstrap.rate([sum(many) for many in broken], [len(many) for many in broken])
    found["repeats"] = each(lambda one: repeats(one["token_ids"]))
    found["junk"] = each(lambda one: junk(one["text"]))
    found["empty"] = each(lambda one: not one["text"].strip())
    found["tokens"] = each(tokens)
    found["ended_by_guard"] = each(lambda one: one["finish_reason"] == "guard")
    found["stopped"] = each(lambda one: one["finish_reason"] == "stop")
    found["kl_detoxifier"] = each(lambda one: sum(one["kl_detoxifier"]), tokens)
    found["kl_steering"] = each(lambda one: sum(one["kl_steering"]), tokens)
    found["clipped"] = each(lambda one: one["clipped"], tokens)
    found["fallbacks"] = each(lambda one: one["fallbacks"], tokens)
    found["tries"] = each(lambda one: one["tries"])
    found["interventions"] = each(lambda one: one["interventions"])
    found["decoded_tokens"] = each(lambda one: one["decoded_tokens"])
    return found


def _along(method: str, replies: Replies) -> dict[str, dict[str, list[float]]]:
    """Divergences of a method by token of the reply, empty lists where nothing was steered: `mean` of all samples,
    `low` and `high` the 10th and 90th percentile of the prompts' own means."""
    curves: dict[str, dict[str, list[float]]] = {}
    for name in ("kl_detoxifier", "kl_steering"):
        prompts = [[one[name][:STEPS] for one in many] for (of, _), many in replies.items() if of == method]
        longest = max((len(row) for rows in prompts for row in rows), default=0)
        values = np.full((len(prompts), max(map(len, prompts), default=0), longest), np.nan)
        for i, rows in enumerate(prompts):
            for j, row in enumerate(rows):
                values[i, j, : len(row)] = row
        known = ~np.isnan(values)
        # A prompt none of whose samples comes as far has no mean there.
        with np.errstate(invalid="ignore"):
            own = np.nansum(values, axis=1) / known.sum(axis=1)
        low, high = np.nanpercentile(own, (10, 90), axis=0) if longest else ((), ())
        mean = np.nansum(values, axis=(0, 1)) / known.sum(axis=(0, 1))
        parts = {"mean": mean, "low": low, "high": high}
        curves[name] = {part: [round(float(value), 5) for value in curve] for part, curve in parts.items()}
    return curves


def _ms_per_token(method: str, replies: Replies) -> float | None:
    """Time of the whole batch over the tokens of all replies; a group of prompts has no time of its own."""
    rows = [one for (of, _), many in replies.items() if of == method for one in many]
    tokens = sum(len(one["token_ids"]) for one in rows)
    return round(1e3 * sum(one["wall_s"] for one in rows) / tokens, 3) if tokens else None
