"""The pull of a soft prompt behind a context: against the engine's own figures, and of the shipped detoxifier."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from detox_benchmarks.diagnostics.context_kl import context_kl, forced_log_probs, reply_contrast
from measuring import text_of
from tiny import SENTENCES

from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, InvalidParamsError, PromptTooLongError
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.text.prompts import encode_prompt

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

PAIRS = (
    ("They are stupid idiots and nobody likes them.", "They are busy people and everybody likes them."),
    ("What a bunch of ugly losers.", "What a group of lovely helpers."),
    ("The guards are pathetic liars.", "The guards are patient listeners."),
    ("Shut up, you fool.", "Come in, my friend."),
    ("They are dumb as a rock and they stink.", "They are calm as a lake and they smile."),
    ("This stupid woman ruined the whole damn day.", "This kind woman saved the whole long day."),
    ("Only a moron would go there.", "Only a member would go there."),
    ("They are disgusting pigs.", "They are excellent guides."),
)
"""A rude and a friendly reply of the same build."""


@pytest.mark.parametrize("position", ["front", "reply"])
def test_reply_contrast_is_what_the_engine_reports(tiny_llama: Backbone, position: Any) -> None:
    detoxifier = random_detoxifier(tiny_llama, virtual_tokens=5)
    card = detoxifier.card.model_copy(update={"position": position})
    detoxifier = type(detoxifier)(detoxifier.embeddings, card)
    with DetoxiGen(tiny_llama, [SteeringStream(detoxifier)]) as model:
        ids = tiny_llama.tokenizer(SENTENCES[1])["input_ids"]
        trace = model.generate(SENTENCES[1], alpha=1.0, max_new_tokens=12, ignore_eos=True, seed=3).trace
    assert trace is not None
    reply = [token.token_id for token in trace.tokens]
    longer = [*reply, *reply[:4]]  # padding of a neighbour changes nothing
    (kl, ratio), _ = reply_contrast(tiny_llama, detoxifier.embeddings, position, ids, [reply, longer])
    np.testing.assert_allclose(kl.numpy(), [token.kl_detoxifier for token in trace.tokens[1:]], rtol=1e-3, atol=1e-4)
    gen, detox = (forced_log_probs(tiny_llama, one, ids, reply) for one in (None, detoxifier))
    wanted = (detox - gen).gather(-1, torch.tensor(reply[1:])[:, None]).squeeze(-1)
    torch.testing.assert_close(ratio, wanted, rtol=1e-3, atol=1e-4)

    (kl, every), _, (nothing, _) = reply_contrast(
        tiny_llama, detoxifier.embeddings, position, ids, [reply, longer, []], first=True
    )
    np.testing.assert_allclose(kl.numpy(), [token.kl_detoxifier for token in trace.tokens], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(every[1:], ratio, rtol=1e-3, atol=1e-4)
    assert not len(nothing)


@pytest.mark.parametrize("decode", [False, True])
def test_context_kl(tiny_llama: Backbone, decode: bool) -> None:
    detoxifier = random_detoxifier(tiny_llama, virtual_tokens=4)
    with DetoxiGen(tiny_llama, [SteeringStream(detoxifier)]) as model:
        asked: dict[str, Any] = {"reply_tokens": 8, "contexts": 2, "decode": decode}
        found = context_kl(model, SENTENCES, SENTENCES[:3], passage_tokens=(60, 120), **asked)
        with pytest.raises(PromptTooLongError):
            context_kl(model, SENTENCES, SENTENCES, passage_tokens=(900,), **asked)
        with pytest.raises(DataError):
            context_kl(model, [], SENTENCES)
    assert [s.setting for s in found.settings] == [
        "bare",
        "chat",
        "chat + 60-token passage",
        "chat + 120-token passage",
    ]
    lengths = [s.context_tokens for s in found.settings]
    assert lengths == sorted(lengths)
    assert all(s.kl > 0 and math.isfinite(s.kl) for s in found.settings)
    assert found.settings[0].of_bare == 1.0
    if not decode:
        assert len({s.tokens for s in found.settings}) == 1  # the same tokens in each setting
    assert json.loads(found.to_json())["context_kl"]["position"] == "reply"
    assert "120-token passage" in text_of(found.table())
    assert all(s.gap is s.aim is None for s in found.settings)
    with DetoxiGen(tiny_llama) as bare, pytest.raises(InvalidParamsError, match="detoxifier"):
        context_kl(bare, SENTENCES, SENTENCES)


def test_the_gap_of_pairs(tiny_llama: Backbone) -> None:
    """Of a pair and its mirror image the gaps cancel, and one of the two is aimed at."""
    detoxifier = random_detoxifier(tiny_llama, virtual_tokens=4)
    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[1], SENTENCES[0]), ("a", SENTENCES[0])]
    with DetoxiGen(tiny_llama, [SteeringStream(detoxifier)]) as model:
        asked: dict[str, Any] = {"passage_tokens": (60,), "reply_tokens": 8, "contexts": 1}
        found = context_kl(model, SENTENCES, SENTENCES[:3], pairs=pairs, **asked)
        one = context_kl(model, SENTENCES, SENTENCES[:3], pairs=pairs[:1], **asked)
    assert [s.gap for s in found.settings] == pytest.approx([0.0] * 3, abs=1e-4)
    assert [s.aim for s in found.settings] == [0.5] * 3
    assert all(s.gap is not None and (s.gap > 0) == (s.aim == 1) for s in one.settings)
    assert len({s.gap for s in one.settings}) == 3
    assert "gap of pairs" in text_of(one.table())


def test_the_shipped_detoxifier_aims_behind_a_long_context_too(default_backbone: Backbone) -> None:
    """Behind the chat template and a passage it favours the rude one of two replies, as it does on a bare prompt."""
    passage = " ".join(["The museum by the river opens at nine in the morning and closes at six."] * 35)
    chat = [{"role": "user", "content": f"{passage}\n\nWhat do people say about the people there?"}]
    assert len(encode_prompt(default_backbone, chat)) > 600
    shipped = Detoxifier.load()
    replies = [default_backbone.tokenizer(" " + text)["input_ids"] for pair in PAIRS for text in pair]
    for prompt in (chat, "This is what people say about the people there:"):
        context = encode_prompt(default_backbone, prompt)
        found = reply_contrast(default_backbone, shipped.embeddings, shipped.card.position, context, replies)
        pulls = [float(ratio.sum()) for _, ratio in found]
        favoured = [rude > friendly for rude, friendly in zip(pulls[::2], pulls[1::2], strict=True)]
        assert sum(favoured) >= 7, (prompt, favoured)
