"""Holds the rows of a runner against whole forward passes of the same model. Knows no sampling.

One script of joins, late joins, rewinds and saves; after every step each row's distribution must be what one pass over
all that the row was fed gives, without cache, batch or padding. So a row alone equals the row among neighbours, a late
one equals an early one, and a path that was taken back leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from detox_guard.detoxifiers.base import EmbeddingPrefix, TokenPrefix, ids_behind
from detox_guard.engine.base import PromptIds
from detox_guard.engine.torch.runner import torch_runner
from detox_guard.settings import EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.detoxifiers.base import View
    from detox_guard.engine.runner import Row, Runner
    from detox_guard.models.backbone import Backbone

__all__ = ["TOLERANCE", "largest_error"]

TOLERANCE = 1e-4
"""The most that a probability may differ, in float32."""
_LENGTHS = (19, 5, 11)
_NEW = 1
"""What the engine is told of how long replies become: so little that rows share their contexts."""


@dataclass(eq=False)
class _Reply:
    """A prompt, its rows, the tokens they were fed, and what they said: (tokens fed before, `[rows, vocab]`)."""

    prompt: list[int]
    rows: list[Row]
    fed: list[int]
    said: list[tuple[list[int], Tensor]]


def largest_error(backbone: Backbone, *, steps: int = 12, back: int = 5) -> float:
    """How far any probability of any row is from that of a whole pass; `inf` where the likeliest token differs too.

    Two views of noise, one in front and one before the reply: soft prompts, or texts where a model takes ids only.
    """
    model = backbone.model
    streams = _views(backbone)
    with torch.inference_mode():
        runner = torch_runner(backbone, streams, EngineConfig(pack_weights=False))
        draw = torch.Generator().manual_seed(3)
        prompts = [torch.randint(4, backbone.vocab_size, (n,), generator=draw).tolist() for n in _LENGTHS]
        early = _compute(runner, prompts[:2])
        late = _compute(runner, prompts[2:])
        replies = early
        for step in range(steps):
            if step == 3:
                replies = [*early, *late]
            if step == 6:
                _step_aside(runner, replies[1])
            if step == 8:
                _take_back(runner, replies[0], back)
            if step == 10:  # to before it stepped aside
                _take_back(runner, replies[1], back)
            for reply in replies:
                if not reply.rows:
                    reply.rows = runner.join(reply.saved, _NEW)  # type: ignore[attr-defined]
            _decode(runner, replies)
        errors = [_error(model, streams, reply) for reply in replies]
        runner.close()
    return max(errors)


def _views(backbone: Backbone) -> list[View]:
    draw = torch.Generator().manual_seed(7)
    if not backbone.running.takes_embeddings:
        words = torch.randint(4, backbone.vocab_size, (11,), generator=draw).tolist()
        return [TokenPrefix(tuple(words[:5])), TokenPrefix(tuple(words[5:]), place="reply", tail=3)]
    scale = float(backbone.model.get_input_embeddings()(torch.arange(4, 40)).std())
    noise = torch.randn(11, backbone.hidden_size, generator=draw) * scale
    return [EmbeddingPrefix(noise[:5], place="front"), EmbeddingPrefix(noise[5:])]


def _compute(runner: Runner, prompts: Sequence[list[int]]) -> list[_Reply]:
    """The prompts, together, seven columns a chunk."""
    prefill = runner.begin([PromptIds(tuple(ids), True) for ids in prompts])
    while not prefill.advance(7, lambda: False):
        pass
    replies = []
    for ids, computed in zip(prompts, prefill.finish(), strict=True):
        reply = _Reply(ids, [], [], [([], computed.logits)])
        reply.saved = computed.rows  # type: ignore[attr-defined]
        replies.append(reply)
    return replies


def _decode(runner: Runner, replies: Sequence[_Reply]) -> None:
    tokens = [[0]] * runner.rows
    for reply in replies:
        token = int(reply.said[-1][1][0].argmax())
        # A token a little off the path that was taken back, or a rewind would only read the same again.
        token = (token + len(reply.said)) % reply.said[-1][1].shape[1]
        reply.fed.append(token)
        for row in reply.rows:
            tokens[row.index] = [token]
    logits = runner.decode(tokens)[:, 0]
    for reply in replies:
        reply.said.append((list(reply.fed), logits[[row.index for row in reply.rows]]))


def _take_back(runner: Runner, reply: _Reply, tokens: int) -> None:
    for row in reply.rows:
        runner.rewind(row, tokens)
    del reply.fed[-tokens:]


def _step_aside(runner: Runner, reply: _Reply) -> None:
    reply.saved = runner.save(reply.rows)  # type: ignore[attr-defined]
    for row in reply.rows:
        runner.leave(row)
    reply.rows = []


def _error(model: Any, streams: Sequence[View], reply: _Reply) -> float:
    """Every step of a reply against whole passes: one a row and a path."""
    worst = 0.0
    paths = [fed for fed, _ in reply.said if not any(fed == other[: len(fed)] != other for other, _ in reply.said)]
    for path in paths:
        for row in range(1 + len(streams)):
            start, p_ref = _whole(model, streams[row - 1] if row else None, reply.prompt, path)
            for fed, logits in reply.said:
                if fed == path[: len(fed)]:
                    p, ref = logits[row].softmax(-1), p_ref[start + len(fed)]
                    worst = max(worst, float((p - ref).abs().max()))
                    gap = ref.max() - ref[p.argmax()]
                    worst = float("inf") if gap > TOLERANCE or not torch.isfinite(p).all() else worst
    return worst


def _whole(model: Any, view: View | None, prompt: list[int], fed: list[int]) -> tuple[int, Tensor]:
    """One pass over all of a row: where the reply's first token is predicted, and `[length, vocab]` probabilities."""
    if isinstance(view, EmbeddingPrefix):
        embed = model.get_input_embeddings()
        p, r, virtual = embed(torch.tensor(prompt)), embed(torch.tensor(fed, dtype=torch.long)), view.embeddings
        parts = [virtual, p, r] if view.place == "front" else [p, virtual, r]
        inputs = {"inputs_embeds": torch.cat(parts).unsqueeze(0)}
        before = len(prompt) + len(virtual)
    else:
        context = list(prompt)
        if view is not None:
            context = [*view.ids, *prompt] if view.place == "front" else [*prompt, *ids_behind(view, prompt)]
        inputs = {"input_ids": torch.tensor([context + fed])}
        before = len(context)
    return before - 1, model(**inputs, use_cache=False).logits[0].float().softmax(-1)
