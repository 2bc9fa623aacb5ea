"""The figures of a reply's tokens: whole, and piece by piece as their text comes out."""

from __future__ import annotations

import pytest

from detox_guard import DetoxiGen, GuardPolicy, InvalidParamsError
from detox_guard.testing import ScriptedScorer

PROMPTS = ["Hello there", "今天天气", "I ❤️ this 😀"]


@pytest.mark.parametrize("changes", [{}, {"stop": "e"}, {"max_new_tokens": 1}, {"alpha": 0.0}], ids=str)
def test_figures_come_with_their_text_and_are_the_trace(model: DetoxiGen, changes: dict[str, object]) -> None:
    for prompt in PROMPTS:
        chunks = list(model.stream(prompt, trace_top=3, **changes))
        reply = chunks[-1].generation
        assert reply is not None
        assert reply.trace is not None
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert tuple(tokens) == reply.trace.tokens
        assert len(tokens) == reply.usage.completion_tokens
        assert "".join(token.text for token in tokens) == reply.text
        out = told = ""
        for chunk in chunks:
            out += chunk.text
            told += "".join(token.text for token in chunk.tokens)
            assert out.startswith(told)
    assert not any(chunk.tokens for chunk in model.stream(PROMPTS[0], trace=False, trace_top=3))


def test_under_a_guard_no_figure_is_told_before_its_text(model: DetoxiGen) -> None:
    asked = {"seed": 3, "max_new_tokens": 40, "alpha": 3.0}
    said = model.generate("Hello there", **asked).text
    policy = GuardPolicy(scorer=ScriptedScorer(said[18:22]), unit=4, max_rewinds=1)
    for action in ("replace", "stop"):
        chunks = list(model.stream("Hello there", guard=policy.replace(on_exhausted=action), trace_top=5, **asked))
        reply = chunks[-1].generation
        assert reply is not None
        assert reply.trace is not None
        assert reply.interventions
        assert sum(bool(chunk.tokens) for chunk in chunks) > 1
        out = told = ""
        for chunk in chunks:
            out += chunk.text
            told += "".join(token.text for token in chunk.tokens)
            assert out.startswith(told)
        assert tuple(token for chunk in chunks for token in chunk.tokens) == reply.trace.tokens
        assert reply.text in (told, told + policy.replacement, f"{told} {policy.replacement}")


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_the_most_probable_tokens_are_those_of_the_steered_distribution(model: DetoxiGen, alpha: float) -> None:
    reply = model.generate("Hello there", alpha=alpha, calm_share=1.0, top_k=4, trace_top=20, seed=5)
    assert reply.trace is not None
    for token in reply.trace.tokens:
        found = {one.token_id: one.p for one in token.top}
        assert 1 <= len(found) <= 4
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)
        assert found[token.token_id] == pytest.approx(token.p_after, abs=1e-6)
        if alpha == 0:
            assert token.top[0].token_id == token.preferred_id
            assert token.top[0].text == token.preferred
    fewer = model.generate("Hello there", alpha=alpha, calm_share=1.0, top_k=4, trace_top=2, seed=5)
    assert fewer.trace is not None
    assert [token.top for token in fewer.trace.tokens] == [token.top[:2] for token in reply.trace.tokens]


def test_steering_moves_the_most_probable_tokens(model: DetoxiGen) -> None:
    first = [
        model.generate("Hello there", alpha=alpha, calm_share=1.0, trace_top=8, max_new_tokens=1, seed=5).trace
        for alpha in (0.0, 9.0)
    ]
    plain, steered = [[(one.token_id, one.p) for one in trace.tokens[0].top] for trace in first if trace is not None]
    assert plain != steered


@pytest.mark.parametrize("many", [-1, 21, 1.5])
def test_bounds(model: DetoxiGen, many: float) -> None:
    with pytest.raises(InvalidParamsError, match="trace_top"):
        model.generate("Hi", trace_top=many)
