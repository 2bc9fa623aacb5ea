"""How likely given replies are behind a prompt, over any runner: each token is fed, none is chosen.

Knows rows and logits; knows no views, no requests. torch reads a whole reply in one pass (`steering.forced`); here it
takes a step a token, as decoding does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from detox_guard.engine.base import PromptIds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.engine.runner import Runner

__all__ = ["forced_nats"]


@torch.inference_mode()
def forced_nats(
    runner: Runner, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]], *, rows: int = 16
) -> list[float]:
    """Nats of each reply given the prompt, summed over its tokens; 0 for an empty reply.

    `rows`: the most replies that are read side by side. The runner must have no row of its own under way; it has none
    afterwards. Raises what the runner raises.
    """
    prefill = runner.begin([PromptIds(tuple(prompt_ids), False)])
    while not prefill.advance(len(prompt_ids), lambda: False):
        pass
    computed = prefill.finish()[0]
    nats = [0.0] * len(replies)
    # The longest first, so that those that end are always the last rows.
    order = sorted(range(len(replies)), key=lambda i: -len(replies[i]))
    for begin in range(0, len(order), rows):
        alive = [i for i in order[begin : begin + rows] if replies[i]]
        longest = len(replies[order[begin]])
        handles = runner.join([computed.rows[0]] * len(alive), longest)
        logits = computed.logits[:1].expand(len(alive), -1)
        step = 0
        while alive:
            log_p = logits.log_softmax(-1)
            for row, i in enumerate(alive):
                nats[i] -= float(log_p[row, replies[i][step]])
            step += 1
            while alive and len(replies[alive[-1]]) == step:
                alive.pop()
                runner.leave(handles.pop())
            if alive:
                logits = runner.decode([[replies[i][step - 1]] for i in alive])[:, -1]
    runner.clear()
    return nats
