"""Log probabilities: of the steered distribution, whole and in a stream, and only of text that was released."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from serving import chat, events, served, text_of

from detox_guard import GuardPolicy
from detox_guard.server import ServerConfig
from detox_guard.testing import ScriptedScorer

if TYPE_CHECKING:
    import httpx

    from detox_guard import DetoxiGen

PLAIN = ServerConfig(guard=None)
ASKED: dict[str, Any] = {"max_tokens": 12, "seed": 4, "detox": {"alpha": 3, "calm_share": 1}}
HI = [{"role": "user", "content": "Hi"}]


def completion(client: httpx.Client, **changes: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "The quick brown fox", **ASKED, **changes})


def test_a_chat_tells_the_most_probable_tokens_by_the_steered_distribution(model: DetoxiGen) -> None:
    with served(model, PLAIN) as client:
        whole = chat(client, logprobs=True, top_logprobs=4, **ASKED).json()["choices"][0]["logprobs"]
        told = events(chat(client, logprobs=True, top_logprobs=4, stream=True, **ASKED))
        none = chat(client, logprobs=True, top_logprobs=0, **ASKED).json()["choices"][0]["logprobs"]
    reply = model.generate(HI, max_new_tokens=12, seed=4, alpha=3.0, calm_share=1.0, trace_top=4)
    assert reply.trace is not None
    for found, token in zip(whole["content"], reply.trace.tokens, strict=True):
        assert found["logprob"] == pytest.approx(math.log(token.p_after), abs=1e-4)
        assert [one["token"] for one in found["top_logprobs"]] == [one.text for one in token.top]
        assert [one["logprob"] for one in found["top_logprobs"]] == pytest.approx(
            [math.log(one.p) for one in token.top], abs=1e-4
        )
        assert all(one["bytes"] in (None, list(one["token"].encode())) for one in found["top_logprobs"])
    assert all(one["top_logprobs"] == [] for one in none["content"])
    pieces = [choice for one in told for choice in one["choices"]]
    assert [one for piece in pieces for one in (piece["logprobs"] or {"content": ()})["content"]] == whole["content"]
    assert sum(piece["logprobs"] is not None for piece in pieces) > 2


def test_a_completion_tells_them_too_with_the_drawn_token_among_them(model: DetoxiGen) -> None:
    with served(model, PLAIN) as client:
        whole = completion(client, logprobs=2).json()["choices"][0]
        told = events(completion(client, logprobs=2, stream=True))
    logprobs = whole["logprobs"]
    assert "".join(logprobs["tokens"]) == whole["text"]
    for at, token in enumerate(logprobs["tokens"]):
        assert logprobs["top_logprobs"][at][token] == logprobs["token_logprobs"][at]
        assert 1 <= len(logprobs["top_logprobs"][at]) <= 3
        assert whole["text"][logprobs["text_offset"][at] :].startswith(token)
    pieces = [choice["logprobs"] for one in told for choice in one["choices"] if choice["logprobs"]]
    assert {name: [one for piece in pieces for one in piece[name]] for name in logprobs} == logprobs


@pytest.mark.parametrize("many", [-1, 6, 1.5])
def test_a_completion_has_bounds(model: DetoxiGen, many: float) -> None:
    with served(model, PLAIN) as client:
        refused = completion(client, logprobs=many)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")


def test_under_a_guard_they_come_with_their_sentence_and_never_for_what_was_taken_back(model: DetoxiGen) -> None:
    asked = {**ASKED, "max_tokens": 40}
    prompt = "The quick brown fox"
    said = model.generate(prompt, max_new_tokens=40, seed=4, alpha=3.0, calm_share=1.0).text
    policy = GuardPolicy(scorer=ScriptedScorer(said[20:24]), unit=4, max_rewinds=0)
    with served(model, ServerConfig(guard=policy)) as client:
        whole = completion(client, **{**asked, "logprobs": 5}).json()["choices"][0]
        told = events(completion(client, **{**asked, "logprobs": 5, "stream": True}))
    assert whole["finish_reason"] == "content_filter"
    kept = whole["text"].removesuffix("[removed]").rstrip()
    assert "".join(whole["logprobs"]["tokens"]).rstrip() == kept
    text = tokens = ""
    for one in told:
        for choice in one["choices"]:
            text += choice["text"]
            tokens += "".join((choice["logprobs"] or {"tokens": ()})["tokens"])
            assert text.startswith(tokens)
    assert text == text_of(told) == whole["text"]
    assert tokens.rstrip() == kept


def test_a_fixed_guard_tells_no_token_that_it_has_not_seen(model: DetoxiGen) -> None:
    fixed = ServerConfig(guard=GuardPolicy(scorer=ScriptedScorer("nothing says this")), allow_unguarded=False)
    with served(model, fixed) as client:
        refused = chat(client, logprobs=True, top_logprobs=1, **ASKED)
        own = chat(client, logprobs=True, **ASKED).json()["choices"][0]["logprobs"]["content"]
        traced = chat(client, **{**ASKED, "detox": {"trace": True}}).json()["choices"][0]["detox"]["trace"]
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "guard_is_fixed")
    assert own
    assert all(one["top_logprobs"] == [] for one in own)
    assert traced
    assert not any("preferred" in one or "preferred_id" in one for one in traced)
