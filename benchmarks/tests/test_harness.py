"""lm-evaluation-harness' three questions, on a tiny model, against the model's own figures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import SENTENCES

from detox_guard.detoxifiers.soft_prompt import SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.settings import DecodingParams

pytest.importorskip("lm_eval")

from detox_benchmarks.utility.harness import DetoxiGenLM

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone


def asked(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=args)]


def test_plain_likelihoods_are_the_models_own(tiny_llama: Backbone) -> None:
    text, tokenizer = SENTENCES[0], tiny_llama.tokenizer
    context, continuation = text[: text.index(" ", 8)], text[text.index(" ", 8) :]
    with DetoxiGen(tiny_llama) as model:
        lm = DetoxiGenLM(model, DecodingParams(alpha=0.0))
        [(nats, greedy)] = lm.loglikelihood(asked(context, continuation))
        [rolling] = lm.loglikelihood_rolling(asked(text))
        said = model.generate(context, DecodingParams(alpha=0.0, temperature=0.0, max_new_tokens=3, ignore_eos=True))
        [(_, its_own)] = lm.loglikelihood(asked(context, said.text))
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        log_p = tiny_llama.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    first = len(tokenizer(context)["input_ids"]) - 1
    assert nats == pytest.approx(float(log_p[first:].sum()), rel=1e-4)
    assert rolling == pytest.approx(float(log_p.sum()), rel=1e-4)
    assert (greedy, its_own) == (False, True)


def test_steered_likelihoods_are_those_of_decoding(tiny_llama: Backbone) -> None:
    stream = SteeringStream(random_detoxifier(tiny_llama, virtual_tokens=4))
    words = tiny_llama.tokenizer
    params = DecodingParams(alpha=2.0, calm_share=1, rule="dexperts", top_p=1.0, max_new_tokens=3, ignore_eos=True)
    with DetoxiGen(tiny_llama, [stream]) as model:
        replies = [model.generate(SENTENCES[1], params.replace(seed=seed)) for seed in range(40)]
        before = words(SENTENCES[1])["input_ids"]
        [reply, *_] = [  # one that reads as it was decoded
            one
            for one in replies
            if one.trace
            and words(SENTENCES[1] + one.text)["input_ids"] == [*before, *(t.token_id for t in one.trace.tokens)]
        ]
        assert reply.trace is not None
        lm = DetoxiGenLM(model, params)
        [(nats, _)] = lm.loglikelihood(asked(SENTENCES[1], reply.text))
        [text] = lm.generate_until(asked(SENTENCES[1], {"until": ["."], "max_gen_toks": 4}))
        greedy = model.generate(SENTENCES[1], params, temperature=0.0, max_new_tokens=4, stop=".")
    assert nats == pytest.approx(sum(math.log(token.p_after) for token in reply.trace.tokens), rel=1e-3)
    assert text == greedy.text
