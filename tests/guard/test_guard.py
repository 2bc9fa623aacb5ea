"""The guard's promise: what was flagged is never released, whatever the scorer says and however late it says it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from guarding import PARAMS, PROMPTS, Scripted, fickle, with_letter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_tiny_backbone

from detox_guard import (
    DecodingParams,
    DetoxiGen,
    GuardError,
    GuardPolicy,
    InvalidParamsError,
    Rung,
    ScorerError,
)
from detox_guard._reply import Speaker
from detox_guard.engine import End, Go, Rewind, TokenStep
from detox_guard.guard.reply import GuardedReply, closed_length
from detox_guard.text.tools import parse_tool_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard import Generation


policies = st.builds(
    GuardPolicy,
    unit=st.sampled_from(["sentence", 1, 3, 8]),
    max_unit_tokens=st.sampled_from([4, 48]),
    context_chars=st.sampled_from([0, 5, 200]),
    ladder=st.sampled_from([(), (2.0,), (2.0, 4.0), (Rung(alpha=3.0, rule="detoxigen", temperature=0.5),)]),
    max_rewinds=st.integers(0, 4),
    on_exhausted=st.sampled_from(["replace", "stop"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=policies,
    salt=st.integers(0, 9999),
    share=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 99),
    alpha=st.sampled_from([0.0, 1.5]),
    stop=st.sampled_from([(), ("e",)]),
)
def test_nothing_flagged_is_released(
    tiny: DetoxiGen, policy: GuardPolicy, salt: int, share: float, seed: int, alpha: float, stop: tuple[str, ...]
) -> None:
    score_of = fickle(salt, share)
    params = PARAMS.replace(guard=policy.replace(scorer=Scripted(score_of)), seed=seed, alpha=alpha, stop=stop)
    chunks = list(tiny.stream("Hello there", params))
    whole = chunks[-1].generation
    assert whole is not None
    units = [chunk.text for chunk in chunks if chunk.text]
    replaced = whole.finish_reason == "guard" and policy.on_exhausted == "replace"
    if replaced:
        assert units.pop().strip() == policy.replacement
    before = ""
    for unit in units:
        assert score_of(unit) <= policy.threshold
        tail = before[-policy.context_chars :] if policy.context_chars else ""
        assert not tail or score_of(tail + unit) <= policy.threshold
        before += unit
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert not any(mark in before for mark in stop)
    assert len(whole.interventions) <= (policy.max_rewinds + 1) * (len(units) + 1)
    assert (whole.finish_reason == "guard") == bool(
        whole.interventions and whole.interventions[-1].action == policy.on_exhausted
    )
    # Slower verdicts change nothing but how much was thrown away; nor does another way of asking.
    slow = params.replace(guard=policy.replace(scorer=Scripted(score_of, delay_s=0.004)))
    again = tiny.generate("Hello there", slow)
    assert (again.text, again.finish_reason, again.interventions) == (
        whole.text,
        whole.finish_reason,
        whole.interventions,
    )
    assert again.trace == whole.trace
    assert again.usage.completion_tokens == whole.usage.completion_tokens == len(whole.trace or ())


def test_every_way_of_asking_gives_the_same_text(tiny: DetoxiGen) -> None:
    params = PARAMS.replace(guard=GuardPolicy(scorer=Scripted(fickle(3, 0.2)), unit=4))

    async def streamed() -> list[str]:
        return ["".join([chunk.text async for chunk in tiny.astream(prompt, params)]) for prompt in PROMPTS]

    async def whole() -> list[str]:
        return [r.text for r in await asyncio.gather(*(tiny.agenerate(prompt, params) for prompt in PROMPTS))]

    expected = [tiny.generate(prompt, params).text for prompt in PROMPTS]
    assert [r.text for r in tiny.batch(PROMPTS, params)] == expected
    assert asyncio.run(streamed()) == asyncio.run(whole()) == expected


def test_a_guard_that_flags_nothing_changes_nothing(tiny: DetoxiGen) -> None:
    for prompt in PROMPTS:
        plain = tiny.generate(prompt)
        guarded = tiny.generate(prompt, guard=GuardPolicy(scorer=Scripted(lambda text: 0.0)))
        assert (guarded.text, guarded.finish_reason, guarded.trace) == (plain.text, plain.finish_reason, plain.trace)
        assert (guarded.interventions, guarded.usage) == ((), plain.usage)


def test_neighbours_are_not_touched(tiny: DetoxiGen) -> None:
    alone = [tiny.generate(prompt).text for prompt in PROMPTS]
    guarded = PARAMS.replace(guard=GuardPolicy(scorer=Scripted(fickle(1, 0.5), delay_s=0.003), unit=2))
    mixed = tiny.batch([*PROMPTS, *PROMPTS], [PARAMS] * 4 + [guarded] * 4)
    assert [r.text for r in mixed[:4]] == alone
    assert [r.text for r in mixed[4:]] == [tiny.generate(prompt, guarded).text for prompt in PROMPTS]
    assert sum(len(r.interventions) for r in mixed[4:]) > 4


def test_a_flagged_word_is_decoded_again_without_it(tiny: DetoxiGen) -> None:
    plain = tiny.generate("Hello there")
    letter = next(c for c in plain.text[8:] if c.isalpha() and c.isascii())
    policy = GuardPolicy(scorer=Scripted(with_letter(letter)), unit=3, max_rewinds=100, keep_discarded=True)
    guarded = tiny.generate("Hello there", guard=policy)
    assert letter in plain.text
    assert letter not in guarded.text.replace(policy.replacement, "")
    first = guarded.interventions[0]
    assert (first.action, first.alpha, first.next_alpha) == ("rewind", 1.5, 6.0)
    assert first.text is not None
    assert letter in first.text
    assert first.text in plain.text
    assert guarded.usage.discarded_tokens >= first.tokens > 0
    assert tiny.stats().tokens_rewound > 0


@pytest.mark.parametrize("on_exhausted", ["replace", "stop", "raise"])
def test_exhausted(tiny: DetoxiGen, on_exhausted: str) -> None:
    policy = GuardPolicy(scorer=Scripted(lambda text: 0.8), max_rewinds=2, on_exhausted=on_exhausted)
    if on_exhausted == "raise":
        with pytest.raises(GuardError, match=r"0\.80, over 0\.5, after 2 rewinds"):
            tiny.generate("Hello there", guard=policy)
        return
    r = tiny.generate("Hello there", guard=policy)
    assert (r.text, r.finish_reason) == ("[removed]" if on_exhausted == "replace" else "", "guard")
    assert [event.action for event in r.interventions] == ["rewind", "rewind", on_exhausted]
    assert [event.alpha for event in r.interventions] == [1.5, 6.0, 9.0]
    assert r.usage.completion_tokens == 0
    assert r.usage.discarded_tokens > 0


@pytest.mark.parametrize(
    "score",
    [lambda texts: 1 / 0, lambda texts: [float("nan")] * len(texts), lambda texts: [0.0] * 9, lambda texts: ["x"]],
)
def test_a_broken_scorer_fails_its_request_and_no_other(tiny: DetoxiGen, score: Any) -> None:
    class Broken:
        name = "broken"

        def score(self, texts: Sequence[str]) -> Any:
            return score(texts)

    expected = [tiny.generate(prompt).text for prompt in PROMPTS]
    results = tiny.batch(
        [*PROMPTS, "y"], [PARAMS] * 4 + [PARAMS.replace(guard=GuardPolicy(scorer=Broken()))], return_exceptions=True
    )
    assert [r.text for r in results[:4]] == expected
    assert isinstance(results[4], ScorerError)
    released = []
    with pytest.raises(ScorerError):
        released.extend(tiny.stream("y", PARAMS.replace(guard=GuardPolicy(scorer=Broken()))))
    assert released == []


def test_a_text_that_cannot_be_scored_fails_alone(tiny: DetoxiGen) -> None:
    def score_of(text: str) -> float:
        if "bad" in text:
            raise ValueError("cannot read this")
        return 0.0

    policy = GuardPolicy(scorer=Scripted(score_of), scan_input=True)
    results = tiny.batch(["good", "bad", "good"], PARAMS.replace(guard=policy), return_exceptions=True)
    assert [type(r).__name__ for r in results] == ["Generation", "ScorerError", "Generation"]


@pytest.mark.parametrize("messages", [False, True])
def test_scan_input(tiny: DetoxiGen, messages: bool) -> None:
    prompt: Any = [{"role": "user", "content": "a bad word"}] if messages else "a bad word"
    policy = GuardPolicy(scorer=Scripted(with_letter("d")), scan_input=True)
    before = tiny.stats().submitted
    chunks = list(tiny.stream(prompt, guard=policy))
    r = chunks[-1].generation
    assert r is not None
    assert ("".join(chunk.text for chunk in chunks), r.text, r.finish_reason) == ("[removed]", "[removed]", "guard")
    assert asyncio.run(tiny.agenerate(prompt, guard=policy)).text == "[removed]"
    assert tiny.batch([prompt], PARAMS.replace(guard=policy))[0].text == "[removed]"
    assert tiny.stats().submitted == before
    with pytest.raises(GuardError):
        tiny.generate(prompt, guard=policy.replace(on_exhausted="raise"))
    assert tiny.generate("kind", guard=policy, max_new_tokens=1).finish_reason in {"length", "guard", "stop"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 0.0), ("threshold", 1.0), ("threshold", float("nan")), ("threshold", True), ("unit", 0),
        ("unit", "word"), ("context_chars", -1), ("ladder", (-1.0,)), ("ladder", "2"), ("max_rewinds", -1),
        ("max_rewinds", 1000), ("on_exhausted", "ignore"), ("scorer", 3), ("scorer", ""), ("scorer_timeout_s", 0.0),
        ("scan_input", "yes"), ("on_event", 3), ("no_such_field", 1), ("max_unit_tokens", 0),
    ],
)  # fmt: skip
def test_bad_policies_name_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidParamsError, match=field) as caught:
        GuardPolicy(**{field: value})
    assert caught.value.field.split(".")[0] == field


def test_a_guard_of_the_instance_stays_unless_a_call_says_otherwise(tiny: DetoxiGen) -> None:
    policy = GuardPolicy(scorer=Scripted(lambda text: 1.0), max_rewinds=0, replacement="[removed]")
    own = DetoxiGen(tiny.backbone, tiny.streams, params=PARAMS.replace(guard=policy))
    with own:
        for reply in (
            own.generate("x"),
            own.generate("x", DecodingParams(max_new_tokens=5, seed=11)),
            own.generate("x", DecodingParams(max_new_tokens=5).replace(seed=11), temperature=0.7),
            *own.batch(["x"], DecodingParams(max_new_tokens=5, seed=11)),
        ):
            assert (reply.text, reply.finish_reason) == ("[removed]", "guard")
        for free in (own.generate("x", guard=None), own.generate("x", DecodingParams(guard=None, max_new_tokens=5))):
            assert free.finish_reason != "guard"


@pytest.mark.parametrize("text", ["\n\n" + "a" * 60, "a" * 60])
def test_a_unit_without_spaces_is_cut_at_twice_its_longest(text: str) -> None:
    policy = GuardPolicy(max_unit_tokens=4)
    assert closed_length(text, policy, False, 7) == 0
    assert closed_length(text, policy, False, 8) == len(text)


# -- what a reader gets: a model whose words are dictated


def dictated(policy: GuardPolicy, *attempts: str, seed: int = 1) -> Generation:
    """The reply of a model that says the first text, and after each rewind the next (the last one repeats)."""
    backbone = make_tiny_backbone("llama")
    reply = GuardedReply(
        Speaker(backbone), "Hi", DecodingParams(guard=policy, alpha=0.0, seed=seed, max_new_tokens=1024)
    )
    chunks: list[Any] = []
    reply.put = chunks.append
    said = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in attempts]
    (instead,) = backbone.tokenizer("*", add_special_tokens=False)["input_ids"]
    emitted: list[int] = []
    banned: frozenset[int] = frozenset()
    tries = 0
    while True:
        ids = said[min(tries, len(said) - 1)]
        verdict: Any
        if len(emitted) < len(ids):
            token = ids[len(emitted)]
            emitted.append(instead if token in banned else token)
            verdict = reply.on_token(
                TokenStep(len(emitted) - 1, emitted[-1], 1.0, 1.0, 0.0, 0.0, 0.0, False, emitted[-1], 1.0, False)
            )
        else:
            verdict = reply.on_end("stop")
            time.sleep(0 if verdict else 0.001)
        if isinstance(verdict, Go | Rewind):
            banned = verdict.banned
        if isinstance(verdict, Rewind):
            del emitted[len(emitted) - verdict.tokens :]
            tries += 1
        elif isinstance(verdict, End):
            reply.on_finish(verdict.reason)
            break
    generation = chunks[-1].generation
    assert "".join(chunk.text for chunk in chunks) == generation.text
    return generation  # type: ignore[no-any-return]


def spelt_out(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" if c.isalpha() else c for c in text)


@pytest.mark.parametrize("longest", [4, 48, 1024])
@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "post", "arguments": {"text": "%s"}}\n</tool_call>',
        '{"text": "It rains. %s"}',
        '{"answer": "{\\"text\\": \\"It rains.\\"}", "%s": [1]}',
        "post(text='%s')",
    ],
)
@pytest.mark.parametrize("insult", ["You idiot.", spelt_out("You idiot.")])
def test_strings_are_judged_decoded(text: str, longest: int, insult: str) -> None:
    policy = GuardPolicy(
        scorer=Scripted(lambda text: float("idiot" in text.lower())), max_rewinds=0, max_unit_tokens=longest
    )
    reply = dictated(policy, text % insult)
    assert reply.finish_reason == "guard"
    assert insult not in reply.text
    assert dictated(policy, text % "You friend.").text == text % "You friend."


@pytest.mark.parametrize("longest", [4, 48, 1024])
def test_content_is_judged_without_the_call_in_it(longest: int) -> None:
    call = '<tool_call>\n{"name": "post", "arguments": {"text": "x"}}\n</tool_call>'
    content, _, _ = parse_tool_calls(f"You are an id{call}iot, friend.")
    word = content[content.index("id") : content.index("iot") + 3]  # as a reader has it, with a break or without
    policy = GuardPolicy(scorer=Scripted(lambda text: float(word in text)), max_rewinds=0, max_unit_tokens=longest)
    assert dictated(policy, f"You are an id{call}iot, friend.").finish_reason == "guard"
    assert dictated(policy, f"You are an id{call}ol, friend.").finish_reason == "stop"


def test_the_flagged_word_is_found_by_halving() -> None:
    sentence = "The people who came here today said that he is an idiot and a friend. Bye."
    scorer = Scripted(lambda text: float("idiot" in text))
    policy = GuardPolicy(scorer=scorer, max_unit_tokens=96, keep_discarded=True)
    reply = dictated(policy, sentence, sentence.replace("idiot", "artist"))
    assert reply.text == sentence.replace("idiot", "artist")
    (event,) = reply.interventions
    # As every beginning in turn would have it: the word's first token of the first beginning that is flagged.
    ids = make_tiny_backbone("llama").tokenizer
    tokens = [ids.decode([i]) for i in ids(sentence, add_special_tokens=False)["input_ids"]]
    over = next(i for i in range(len(tokens)) if "idiot" in "".join(tokens[: i + 1]))
    first = max(i for i in range(over + 1) if tokens[i].startswith(" "))
    assert event.banned == tokens[first]
    assert event.tokens > 30
    assert len(scorer.calls) <= 12
    assert sum(map(len, scorer.calls)) <= 40  # every beginning would be some 30 more


def test_scan_input_reads_sentence_by_sentence_and_decoded(tiny: DetoxiGen) -> None:
    harmless = (
        "The library opens at nine in the morning and closes at six in the evening. Visitors may borrow books. " * 3
    )
    for text in (
        f"{harmless}You are a complete idiot. {harmless}",
        json.dumps({"comments": [harmless, "You are a complete idiot."]}),
        f'Read this: {json.dumps({"by": "them", "text": 0})[:-2]}"{spelt_out("You are a complete idiot.")}"}}',
    ):
        policy = GuardPolicy(scan_input=True)
        assert tiny.generate([{"role": "user", "content": text}], guard=policy).finish_reason == "guard"
    fit = tiny.generate(harmless, guard=GuardPolicy(scan_input=True, threshold=0.9), max_new_tokens=1)
    assert not fit.interventions or fit.interventions[0].unit >= 0
