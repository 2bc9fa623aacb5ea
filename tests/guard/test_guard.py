"""The guard's promise: what was flagged is never released, whatever the scorer says and however late it says it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from harness import random_detoxifier, random_streams, request, torch_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_tiny_backbone

from detox_guard import (
    Chunk,
    DecodingParams,
    DetoxiGen,
    GuardError,
    GuardPolicy,
    InvalidParamsError,
    Rung,
    ScorerError,
    SteeringStream,
    aguard_text,
    guard_text,
)
from detox_guard.engine import Ended, Rewind, TokenStep
from detox_guard.guard.reply import GuardedReply, closed_length, scan
from detox_guard.scorers.batcher import judge_for
from detox_guard.text.tools import parse_tool_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from detox_guard import Generation

PARAMS = DecodingParams(alpha=1.5, calm_share=1, max_new_tokens=40, seed=11)
PROMPTS = ["Hello there", "So, I'm starting to think", "今天天气", "x"]


class Scripted:
    """A scorer that is a function of the text, as slow as it is told, and keeps what it was asked."""

    def __init__(self, judge: Callable[[str], float], *, delay_s: float = 0.0) -> None:
        self.name = "scripted"
        self.judge = judge
        self.delay_s = delay_s
        self.calls: list[list[str]] = []

    def score(self, texts: Sequence[str]) -> list[float]:
        self.calls.append(list(texts))
        if self.delay_s:
            time.sleep(self.delay_s)
        return [self.judge(text) for text in texts]


def fickle(salt: int, share: float) -> Callable[[str], float]:
    """Flags about `share` of all texts, at random but always the same ones."""
    return lambda text: 0.9 if zlib.crc32(f"{salt}{text}".encode()) % 1000 < share * 1000 else 0.1


def with_letter(letter: str) -> Callable[[str], float]:
    return lambda text: 1.0 if letter in text else 0.0


@pytest.fixture(scope="module")
def tiny() -> Iterator[DetoxiGen]:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    with DetoxiGen(backbone, [SteeringStream(random_detoxifier(backbone))], params=PARAMS) as model:
        yield model
        deadline = time.monotonic() + 10
        while model.stats().seats:
            assert time.monotonic() < deadline, "a seat was left taken"
            time.sleep(0.002)
        stats = model.stats()
        assert (stats.tokens_guarded, stats.rows, stats.queued) == (stats.steps_guarded, 0, 0)


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
    judge = fickle(salt, share)
    params = PARAMS.replace(guard=policy.replace(scorer=Scripted(judge)), seed=seed, alpha=alpha, stop=stop)
    chunks = list(tiny.stream("Hello there", params))
    whole = chunks[-1].generation
    assert whole is not None
    units = [chunk.text for chunk in chunks if chunk.text]
    replaced = whole.finish_reason == "guard" and policy.on_exhausted == "replace"
    if replaced:
        assert units.pop().strip() == policy.replacement
    before = ""
    for unit in units:
        assert judge(unit) <= policy.threshold
        tail = before[-policy.context_chars :] if policy.context_chars else ""
        assert not tail or judge(tail + unit) <= policy.threshold
        before += unit
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert not any(mark in before for mark in stop)
    assert len(whole.interventions) <= (policy.max_rewinds + 1) * (len(units) + 1)
    assert (whole.finish_reason == "guard") == bool(
        whole.interventions and whole.interventions[-1].action == policy.on_exhausted
    )
    # Slower verdicts change nothing but how much was thrown away; nor does another way of asking.
    slow = params.replace(guard=policy.replace(scorer=Scripted(judge, delay_s=0.004)))
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
    def judge(text: str) -> float:
        if "bad" in text:
            raise ValueError("cannot read this")
        return 0.0

    policy = GuardPolicy(scorer=Scripted(judge), scan_input=True)
    results = tiny.batch(["good", "bad", "good"], PARAMS.replace(guard=policy), return_exceptions=True)
    assert [type(r).__name__ for r in results] == ["Generation", "ScorerError", "Generation"]


def test_a_slow_scorer_fails_its_request_within_its_limit(tiny: DetoxiGen) -> None:
    scorer = Scripted(lambda text: 0.0, delay_s=3.0)
    started = time.monotonic()
    other = threading.Thread(target=tiny.generate, args=("x",))
    other.start()
    with pytest.raises(ScorerError, match=r"no answer in 0\.2 s"):
        tiny.generate("Hello there", guard=GuardPolicy(scorer=scorer, unit=2, scorer_timeout_s=0.2))
    other.join(5)
    assert not other.is_alive()
    assert time.monotonic() - started < 2.5


def test_cancelled_while_a_verdict_is_out(tiny: DetoxiGen) -> None:
    scorer = Scripted(lambda text: 0.0, delay_s=1.0)

    async def cancel() -> None:
        task = asyncio.create_task(tiny.agenerate("Hello there", guard=GuardPolicy(scorer=scorer), max_new_tokens=3))
        while not scorer.calls:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    deadline = time.monotonic() + 0.5
    while tiny.stats().seats:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_units_of_one_step_are_one_call(tiny: DetoxiGen) -> None:
    scorer = Scripted(lambda text: 0.0)
    policy = GuardPolicy(scorer=scorer, context_chars=0, scan_input=False)
    tiny.batch(["x"] * 24, [PARAMS.replace(guard=policy, seed=1)] * 24)  # some may enter a step late
    texts = sum(len(call) for call in scorer.calls)
    assert texts >= 24
    assert len(scorer.calls) <= texts / 3


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


def test_events_log_and_trace(tiny: DetoxiGen, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, events = tmp_path / "audit.jsonl", []
    policy = GuardPolicy(
        scorer=Scripted(fickle(5, 0.5)), unit=3, on_event=events.append, audit_log=str(log), keep_discarded=True
    )
    r = tiny.generate("Hello there", guard=policy)
    assert tuple(events) == r.interventions
    assert len(events) > 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["score"] for line in lines] == [event.score for event in events]
    assert all(line["seed"] == 11 and line["text"] for line in lines)
    assert r.trace is not None
    page = r.trace.to_html()
    assert page.count("taken back: score") == len(events)
    summary = json.loads(json.dumps(r.summary()))
    assert summary["interventions"][0]["action"] == "rewind"
    assert (summary["guard"], tiny.generate("Hello there").summary()["guard"]) == (r.guard, None) == ("scripted", None)
    # Without being asked to, nothing keeps what was discarded; and a hook that raises hurts nobody.
    quiet = tiny.generate("Hello there", guard=policy.replace(keep_discarded=False, on_event=lambda event: 1 / 0))
    assert quiet.text == r.text
    assert all(event.text is None and event.banned is None for event in quiet.interventions)
    assert any("on_event raised" in record.message for record in caplog.records if record.levelno == logging.ERROR)


def test_an_audit_log_that_cannot_be_written_is_refused_at_once(tiny: DetoxiGen, tmp_path: Path) -> None:
    with pytest.raises(InvalidParamsError, match="audit_log"):
        tiny.generate("x", guard=GuardPolicy(audit_log=str(tmp_path / "no" / "such" / "folder.jsonl")))


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


# -- the engine's side: a reply that is over and goes on after all


def test_a_parked_reply_goes_on_as_if_it_never_stopped() -> None:
    backbone = make_tiny_backbone("llama", initializer_range=0.2)
    engine = torch_engine(backbone, random_streams(backbone, "fr"))
    greedy = DecodingParams(alpha=1.5, temperature=0.0, max_new_tokens=12, seed=1)
    req, plain = request([5, 6, 7], greedy, keep=True)
    engine.submit(req)
    neighbour, other = request([9, 8], greedy.replace(max_new_tokens=60), keep=True)
    engine.submit(neighbour)
    plain.wait()

    for back in (1, 5, 12):
        req, sink = request([5, 6, 7], greedy, keep=True)
        answers: list[Any] = [None, None, None, Rewind(back), None, Ended("stop")]
        sink.on_end = lambda reason, answers=answers: answers.pop(0)  # type: ignore[method-assign]
        engine.submit(req)
        sink.wait()
        assert sink.outcome == "stop"
        kept = 12 - back
        again = sink.steps[:kept] + sink.steps[12:]
        assert [step.token_id for step in again] == plain.ids
        for step, expected in zip(again, plain.steps, strict=True):
            ids, p = step.distribution or ()
            wanted_ids, wanted = expected.distribution or ()
            assert dict(zip(ids.tolist(), p.tolist(), strict=True)) == pytest.approx(
                dict(zip(wanted_ids.tolist(), wanted.tolist(), strict=True)), abs=1e-5
            )
    assert len(other.wait().ids) == 60
    assert engine.stats().rows == 0
    engine.close()


# -- text that another model writes


def in_pieces(text: str, size: int = 3) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


FOREIGN = "It rains. This is a bad day. We stay at home. And then"


@pytest.mark.parametrize(
    ("on_exhausted", "expected"),
    [("replace", "It rains. [removed] We stay at home. And then"), ("stop", "It rains. ")],
)
def test_foreign_text(on_exhausted: str, expected: str) -> None:
    events: list[Any] = []
    policy = GuardPolicy(scorer=Scripted(with_letter("b")), on_exhausted=on_exhausted, context_chars=0)
    assert "".join(guard_text(in_pieces(FOREIGN), policy, events.append)) == expected
    assert [event.action for event in events] == [on_exhausted]

    async def pieces() -> Any:
        for piece in in_pieces(FOREIGN):
            yield piece

    async def joined() -> str:
        return "".join([text async for text in aguard_text(pieces(), policy)])

    assert asyncio.run(joined()) == expected
    with pytest.raises(GuardError):
        list(guard_text(in_pieces(FOREIGN), policy.replace(on_exhausted="raise")))


@given(st.text(alphabet="abc .!?\n", max_size=80), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_foreign_text_that_is_fit_comes_whole(text: str, size: int) -> None:
    policy = GuardPolicy(scorer=Scripted(lambda text: 0.0))
    assert "".join(guard_text(in_pieces(text, size), policy)) == text


def test_foreign_text_fails_closed() -> None:
    released: list[str] = []
    with pytest.raises(ScorerError):
        released.extend(guard_text(in_pieces(FOREIGN), GuardPolicy(scorer=Scripted(lambda text: float("nan")))))
    slow = GuardPolicy(scorer=Scripted(lambda text: 0.0, delay_s=1.0), scorer_timeout_s=0.05)
    with pytest.raises(ScorerError, match="no answer"):
        released.extend(guard_text(in_pieces(FOREIGN), slow))
    assert released == []


def test_one_who_does_not_wait_for_a_verdict_takes_nobody_elses() -> None:
    scorer = Scripted(lambda text: 0.0, delay_s=0.2)
    policy = GuardPolicy(scorer=scorer)

    async def pieces() -> Any:
        yield FOREIGN

    async def give_up() -> None:
        async def read() -> list[str]:
            return [text async for text in aguard_text(pieces(), policy)]

        task = asyncio.create_task(read())
        while not scorer.calls:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    judge = judge_for(scorer)
    asyncio.run(give_up())
    assert "".join(guard_text([FOREIGN], policy)) == FOREIGN
    for stream in ({"a": "hi"}, b"hi", 5):
        with pytest.raises(InvalidParamsError, match="chunks"):
            guard_text(stream, policy)  # type: ignore[arg-type]
    assert judge is judge_for(scorer)
    late = judge.submit(["one"])
    given_up = judge.submit(["two"])
    given_up.cancel()
    assert late.result(5) == judge.submit(["three"]).result(5) == [0.0]


def test_a_forked_child_is_guarded_too() -> None:
    text, policy = "It rains. We stay at home.", GuardPolicy()
    assert "".join(guard_text([text], policy)) == text
    assert judge_for("embedded")._thread is not None  # it waits for more
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if "".join(guard_text([text], policy.replace(scorer_timeout_s=5.0))) == text else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_event_hook_that_ends_its_thread_ends_only_its_request(tiny: DetoxiGen) -> None:
    def leave(event: Any) -> None:
        raise SystemExit(1)

    policy = GuardPolicy(scorer=Scripted(lambda text: 1.0), unit=3, on_event=leave)
    results = tiny.batch(["x", "Hello there"], [PARAMS.replace(guard=policy), PARAMS], return_exceptions=True)
    assert "SystemExit" in str(results[0])
    assert results[1].text == tiny.generate("Hello there").text


def test_an_event_hook_that_asks_its_own_engine_is_told(tiny: DetoxiGen, caplog: pytest.LogCaptureFixture) -> None:
    """It would wait for itself, and everyone with it."""
    policy = GuardPolicy(
        scorer=Scripted(lambda text: 1.0), unit=3, on_event=lambda _: tiny.generate("y", max_new_tokens=2)
    )
    assert tiny.generate("x", guard=policy).finish_reason == "guard"
    assert "the engine's own thread" in caplog.text


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
    reply = GuardedReply(backbone, "Hi", DecodingParams(guard=policy, alpha=0.0, seed=seed, max_new_tokens=1024))
    chunks: list[Any] = []
    reply.put = chunks.append
    said = [backbone.tokenizer(text, add_special_tokens=False)["input_ids"] for text in attempts]
    (instead,) = backbone.tokenizer("*", add_special_tokens=False)["input_ids"]
    emitted: list[int] = []
    tries, deadline = 0, time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline
        ids = said[min(tries, len(said) - 1)]
        verdict: Any
        if len(emitted) < len(ids):
            token = ids[len(emitted)]
            emitted.append(instead if token in reply.request.banned else token)
            verdict = reply.on_token(
                TokenStep(len(emitted) - 1, emitted[-1], 1.0, 1.0, 0.0, 0.0, 0.0, False, emitted[-1], 1.0, False)
            )
        else:
            verdict = reply.on_end("stop")
            time.sleep(0 if verdict else 0.001)
        if isinstance(verdict, Rewind):
            del emitted[len(emitted) - verdict.tokens :]
            tries += 1
        elif isinstance(verdict, Ended):
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


def test_many_flagged_at_once_are_all_served(tiny: DetoxiGen) -> None:
    """A scorer that takes its time for each text; the searches share it."""

    class Slow(Scripted):
        def score(self, texts: Sequence[str]) -> list[float]:
            time.sleep(0.01 * len(texts))
            return super().score(texts)

    scorer = Slow(fickle(5, 0.2))
    policy = GuardPolicy(scorer=scorer, unit=24, max_rewinds=2, scorer_timeout_s=30)
    results = tiny.batch(
        ["Hello there"] * 12,
        [PARAMS.replace(guard=policy, seed=seed, max_new_tokens=24) for seed in range(12)],
        return_exceptions=True,
    )
    assert [type(result).__name__ for result in results] == ["Generation"] * 12
    assert sum(len(result.interventions) for result in results) > 4


def test_what_timed_out_or_was_cancelled_is_not_scored_later(tiny: DetoxiGen) -> None:
    gate, scored = threading.Event(), list[str]()

    class Hangs:
        name = "hangs"

        def score(self, texts: Sequence[str]) -> list[float]:
            hung = not gate.is_set()
            gate.wait(60)
            if not hung:
                scored.extend(texts)
            return [0.0] * len(texts)

    scorer = Hangs()
    policy = GuardPolicy(scorer=scorer, scorer_timeout_s=0.2, unit=3)
    params = PARAMS.replace(guard=policy)

    async def give_up() -> None:
        task = asyncio.create_task(
            tiny.agenerate("Hello there", params.replace(guard=policy.replace(scorer_timeout_s=60)))
        )
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def gone() -> None:
        async def pieces() -> Any:
            yield FOREIGN

        with pytest.raises(ScorerError, match="no answer"):
            _ = [text async for text in aguard_text(pieces(), policy)]

    results = tiny.batch(["Hello there", "x"] * 4, params, return_exceptions=True)
    assert {type(result) for result in results} == {ScorerError}
    asyncio.run(give_up())
    asyncio.run(gone())
    for scan_or_hold in (lambda: scan(["It rains."], policy), lambda: list(guard_text([FOREIGN], policy))):
        with pytest.raises(ScorerError, match="no answer"):
            scan_or_hold()
    deadline = time.monotonic() + 60
    while len(judge_for(scorer)._waiting) > 16:  # the one call that hangs
        assert time.monotonic() < deadline
        time.sleep(0.002)
    gate.set()
    assert "".join(guard_text([FOREIGN], policy.replace(scorer_timeout_s=60))) == FOREIGN
    assert all(text in FOREIGN for text in scored)


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


def test_a_long_prompt_is_scanned_by_a_slow_scorer_in_time() -> None:
    """Each few dozen texts have the limit to themselves; ordinary verdicts come in between."""
    scorer = Scripted(lambda text: float("bad" in text))

    class Slow:
        name = "slow"

        def score(self, texts: Sequence[str]) -> list[float]:
            time.sleep(0.002 * len(texts))
            return scorer.score(texts)

    text = " ".join(f"It rains on day {i} of the year." for i in range(1000))
    policy = GuardPolicy(scorer=Slow(), scorer_timeout_s=1.5)
    assert scan([text], policy) == 0.0
    assert scan([f"{text} A bad day. {text}"], policy) == 1.0


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_scored() -> None:
    scorer = Scripted(lambda text: 0.0)
    params = DecodingParams(guard=GuardPolicy(scorer=scorer, scan_input=True), max_new_tokens=7)
    asked: list[Any] = []

    def check_fits(prompt_ids: list[int], own: DecodingParams) -> None:
        asked.append((len(prompt_ids), own.max_new_tokens))
        raise KeyError("too long")

    with pytest.raises(KeyError):
        GuardedReply(make_tiny_backbone("llama"), "a\n" * 500, params, check_fits=check_fits)
    assert asked[0][0] >= 500
    assert asked[0][1] == 7
    assert scorer.calls == []


# -- chunks as other streams have them


def held_both_ways(chunks: Sequence[Any], policy: GuardPolicy | None = None) -> list[str]:
    async def pieces() -> Any:
        for chunk in chunks:
            yield chunk

    async def joined() -> str:
        return "".join([text async for text in aguard_text(pieces(), policy)])

    return ["".join(guard_text(iter(chunks), policy)), asyncio.run(joined())]


def test_chunks_of_foreign_streams() -> None:
    class Text(str):
        __slots__ = ()

    assert (
        held_both_ways(["It rains. ", None, Text("We stay"), "", Chunk(" at home."), None])
        == ["It rains. We stay at home."] * 2
    )


@pytest.mark.parametrize("odd", [{"text": "x"}, b"x", 3, ["x"], ("x", "y"), object(), float("nan")])
def test_a_chunk_that_is_no_text_is_named(odd: object) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        held_both_ways(["It rains.", odd])
    assert (caught.value.field, caught.value.value) == ("chunks[1]", odd)


@pytest.mark.parametrize("ask", [guard_text, aguard_text])
def test_what_is_no_stream_or_no_policy_is_refused_at_once(ask: Any) -> None:
    async def pieces() -> Any:
        yield "x"

    stream, other = (["x"], pieces()) if ask is guard_text else (pieces(), ["x"])
    for bad in (None, 3, other):
        with pytest.raises(InvalidParamsError) as caught:
            ask(bad)
        assert caught.value.field == "chunks"
    with pytest.raises(InvalidParamsError) as caught:
        ask(stream, {"threshold": 0.5})
    assert caught.value.field == "policy"


@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_held_text_is_cut_alike_however_it_comes(size: int) -> None:
    text = "It rains, and the library in the old town is open " * 20 + "until nine. Bye."
    scorer = Scripted(lambda text: float("bad" in text))
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    units = list(guard_text(chunks, GuardPolicy(scorer=scorer)))
    assert "".join(units) == text
    assert max(map(len, units)) <= 48 * 4 + size + 20
    assert len(units) >= 5
