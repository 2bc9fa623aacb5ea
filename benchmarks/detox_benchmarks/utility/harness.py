"""A steered model as a language model of lm-evaluation-harness (EleutherAI): its tasks, plain and steered.

Knows the harness' three questions; the tasks and their data are the harness' own. Needs the extra `harness`::

    python -m detox_benchmarks harness --task wikitext --task squad_completion --alpha 0 --alpha 3 --limit 200
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM

from detox_benchmarks.utility.tasks import nats_of, steered_probabilities
from detox_guard.evaluation.methods import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.settings import DecodingParams

__all__ = ["DetoxiGenLM", "run_harness"]

WINDOW, OVERLAP = 1024, 256
"""Tokens read at once of a long text, and how many of them are only context."""


class DetoxiGenLM(LM):  # type: ignore[misc]  # the harness is checked without its types
    """One model under one set of parameters. Likelihoods are those of the steered distribution at temperature 1 over
    the whole vocabulary; text is decoded greedily unless a task says otherwise. A guard takes no part in likelihoods.
    """

    def __init__(self, model: DetoxiGen, params: DecodingParams) -> None:
        super().__init__()
        self._model, self._params = model, params
        self._method = Method("harness", params.replace(guard=None), tuple(model.streams))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each `(context, continuation)`: log-likelihood in nats, and whether greedy decoding would say it."""
        return [self._likelihood(*self._split(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each whole text, all tokens but its first where the tokenizer puts none before it."""
        found = []
        for request in requests:
            ids = self._ids(request.args[0], special=True)
            total, start = 0.0, 1
            while start < len(ids):
                first = max(0, start - OVERLAP)
                end = min(len(ids), first + WINDOW)
                total += self._likelihood(ids[first:start], ids[start:end])[0]
                start = end
            found.append(total)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations, each up to the first of its `until` strings."""
        params = []
        for _, asked in (request.args for request in requests):
            until = asked.get("until") or ()
            params.append(
                self._params.replace(
                    stop=(until,) if isinstance(until, str) else tuple(until),
                    max_new_tokens=int(asked.get("max_gen_toks", self._params.max_new_tokens)),
                    temperature=float(asked.get("temperature", 0.0)) if asked.get("do_sample") else 0.0,
                )
            )
        return [reply.text for reply in self._model.batch([request.args[0] for request in requests], params)]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, as they are in the text of both: spaces at the seam go with the continuation."""
        cut = len(context) - len(context.rstrip())
        if cut:
            context, continuation = context[:-cut], context[-cut:] + continuation
        before = self._ids(context, special=True)
        whole = self._ids(context + continuation, special=True)
        return (whole[: len(before)], whole[len(before) :]) if before else (whole[:1], whole[1:])

    def _ids(self, text: str, *, special: bool) -> list[int]:
        return list(self._model.backbone.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _likelihood(self, context: Sequence[int], reply: Sequence[int]) -> tuple[float, bool]:
        if not reply:
            return 0.0, True
        backbone = self._model.backbone
        (p,) = steered_probabilities(backbone, [self._method], context, reply, first=True)
        target = torch.tensor(list(reply), device=p.device).unsqueeze(-1)
        nats, _ = nats_of(p, target)
        return -nats, bool((p.argmax(-1, keepdim=True) == target).all())


def run_harness(
    model: DetoxiGen, tasks: Sequence[str], alphas: Sequence[float], *, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The harness' figures by alpha and task; 0 is the plain model. Its data sets come from the hub."""
    import lm_eval

    found = {}
    for alpha in alphas:
        params = model.params.replace(alpha=alpha, calm_share=1, seed=seed)
        out = lm_eval.simple_evaluate(DetoxiGenLM(model, params), tasks=list(tasks), limit=limit, random_seed=seed)
        found[f"{alpha:g}"] = out["results"]
    return found
