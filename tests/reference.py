"""The oracle: DetoxiGen the slow way, in float64, one request at a time, without cache, batch, padding or prefix.

Two whole forward passes give the figures of every step: `[prompt][reply]` for the generator and, for each view,
`[view][prompt][reply]` (front), `[prompt][view][tail][reply]` (reply) or `[its own context][reply]` (system). Nothing
here is shared with the engine.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detox_guard.detoxifiers.base import EmbeddingPrefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.detoxifiers.base import View
    from detox_guard.settings import DecodingParams


@dataclass
class Reference:
    """A float64 copy of a model and the streams that steer it."""

    model: torch.nn.Module
    streams: list[View]
    edge: float = 1e-6
    """How near to top_p the nucleus' mass may end, or how near alike (relative) two tokens at its edge may be, before
    its last token is a coin toss in fp32."""

    @classmethod
    def of(cls, model: torch.nn.Module, streams: list[View]) -> Reference:
        return cls(copy.deepcopy(model).double(), streams)

    def log_probs(
        self, prompt: list[int], reply: list[int], params: DecodingParams, contexts: Sequence[list[int]] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities after penalty and temperature, `[len(reply), vocab]`, of the generator and each stream."""
        out = []
        for steps in self.logits(prompt, reply, contexts):
            for i in range(len(reply) if params.repetition_penalty != 1 else 0):
                for token in {*prompt, *reply[:i]}:
                    x = steps[i, token]
                    steps[i, token] = x * params.repetition_penalty if x < 0 else x / params.repetition_penalty
            out.append((steps / (params.temperature or 1.0)).log_softmax(-1))
        return out[0], out[1:]

    def logits(self, prompt: list[int], reply: list[int], contexts: Sequence[list[int]]) -> list[Tensor]:
        """What the model says before each reply token, `[len(reply), vocab]`, of each view; the generator first."""
        embed = self.model.get_input_embeddings()
        p, r = embed(torch.tensor(prompt)), embed(torch.tensor(reply, dtype=torch.long))
        views = [torch.cat([p, r])]
        own = iter(contexts)
        for view in self.streams:
            soft = isinstance(view, EmbeddingPrefix)
            said = view.embeddings.double() if soft else embed(torch.tensor(view.ids, dtype=torch.long))
            tail = p[:0] if soft or not view.tail else p[-view.tail :]
            parts = {"front": [said, p, r], "reply": [p, said, tail, r]}
            views.append(torch.cat(parts[view.place] if view.place in parts else [embed(torch.tensor(next(own))), r]))
        out = []
        for view in views:
            with torch.no_grad():
                logits = self.model(inputs_embeds=view.unsqueeze(0), use_cache=False).logits[0]
            out.append(logits[len(view) - len(reply) - 1 : len(view) - 1].clone())
        return out

    def distributions(
        self, prompt: list[int], reply: list[int], params: DecodingParams, contexts: Sequence[list[int]] = ()
    ) -> tuple[Tensor, list[bool]]:
        """`p [len(reply), vocab]` to sample each reply token from; whether its nucleus' edge is unsure."""
        gen, streams = self.log_probs(prompt, reply, params, contexts)
        out = torch.zeros_like(gen)
        unsure = []
        for i in range(len(reply)):
            p_gen = gen[i].exp().tolist()
            mass, inside = 0.0, []
            close = False
            for rank, token in enumerate(gen[i].argsort(descending=True).tolist()):
                close |= abs(mass - params.top_p) < self.edge
                if rank and (mass >= params.top_p or (params.top_k and rank >= params.top_k)):
                    close |= p_gen[inside[-1]] - p_gen[token] < self.edge * p_gen[token]  # which of two is the last one
                    break
                inside.append(token)
                mass += p_gen[token]
            floor = params.plausibility * max(p_gen)
            inside = [token for token in inside if p_gen[token] >= floor]
            out[i] = self._mix(gen[i].tolist(), [s[i].tolist() for s in streams], inside, params)
            unsure.append(close)
        return out, unsure

    def _mix(self, gen: list[float], streams: list[list[float]], inside: list[int], params: DecodingParams) -> Tensor:
        weights = [spec.weight for spec in self.streams]
        log_pull = {t: sum(w * (s[t] - gen[t]) for w, s in zip(weights, streams, strict=True)) for t in inside}
        p = torch.zeros(len(gen), dtype=torch.float64)
        alpha = self._bounded(gen, log_pull, params.alpha) if params.rule == "bounded" else params.alpha
        for t in inside:
            if params.rule == "detoxigen":
                g = math.exp(gen[t])
                pull = sum(w * (math.exp(s[t]) - g) for w, s in zip(weights, streams, strict=True))
                p[t] = max(0.0, g + alpha * pull)
            else:
                p[t] = math.exp(gen[t] + alpha * log_pull[t])
        if p.sum() == 0:
            p[max(inside, key=log_pull.__getitem__)] = 1.0
        return p / p.sum()

    @staticmethod
    def _bounded(gen: list[float], pull: dict[int, float], alpha: float) -> float:
        """The largest strength up to alpha that moves the nucleus by at most .4 alpha nats, by halving."""

        def moved(strength: float) -> float:
            def shares(a: float) -> list[float]:
                logits = [gen[t] + a * d for t, d in pull.items()]
                top = max(logits)
                total = sum(math.exp(x - top) for x in logits)
                return [x - top - math.log(total) for x in logits]

            return sum(math.exp(q) * (q - p) for q, p in zip(shares(strength), shares(0.0), strict=True))

        low, high = 0.0, alpha
        if moved(high) <= 0.4 * alpha:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if moved(middle) <= 0.4 * alpha else (low, middle)
        return low
