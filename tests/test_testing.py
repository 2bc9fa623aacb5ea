"""The scripted model for users' own tests: it is asked, and guarded, like the real one."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle

import pytest

from detox_guard import (
    ChatPrompt,
    DetoxiGen,
    GuardError,
    GuardPolicy,
    InvalidParamsError,
    NotPicklableError,
    PromptTooLongError,
    StepError,
    parse_tool_calls,
)
from detox_guard.testing import Said, ScriptedDetoxiGen, ScriptedScorer, tool_call


def test_it_says_what_it_was_told_in_every_way_of_asking() -> None:
    model = ScriptedDetoxiGen(["One two.", "Three."])
    assert model.generate("Hi", alpha=2.0).text == "One two."
    assert "".join(chunk.text for chunk in model.stream("Hi")) == "Three."
    assert [reply.text for reply in model.batch(["a", "b"])] == ["Three.", "Three."]
    assert asyncio.run(model.agenerate(ChatPrompt([{"role": "user", "content": "Hi"}]))).text == "Three."
    assert [call.how for call in model.calls] == ["generate", "stream", "batch", "batch", "agenerate"]
    assert model.calls[0].params.alpha == 2.0
    assert (model.active, model.most_active, model.abandoned) == (0, 2, 0)


async def test_many_are_told_one_by_one() -> None:
    heard: list[tuple[int, str]] = []
    model = ScriptedDetoxiGen(["One.", StepError("broken"), "Three."])
    done = list(
        model.as_completed(
            ["a", "b", "c"], return_exceptions=True, on_chunk=lambda i, chunk: heard.append((i, chunk.text))
        )
    )
    assert [index for index, _ in done] == [0, 1, 2]
    assert isinstance(done[1][1], StepError)
    assert heard == [(0, "One."), (2, "Three.")]
    assert [reply.text async for _, reply in model.aas_completed(["a", "b"])] == ["Three.", "Three."]


def test_a_function_may_answer_from_prompt_and_parameters() -> None:
    model = ScriptedDetoxiGen(lambda prompt, params: f"{prompt} at {params.alpha:g}")
    assert model.generate("Hi", alpha=4.0).text == "Hi at 4"


def test_stop_length_and_what_is_too_long() -> None:
    model = ScriptedDetoxiGen(["one two three four"], context_window=3)
    assert model.generate("Hi", stop="three").text == "one two "
    cut = model.generate("Hi", max_new_tokens=2)
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("one two ", "length", 2)
    with pytest.raises(PromptTooLongError):
        model.generate("a b c d")
    with pytest.raises(InvalidParamsError):
        model.generate("Hi", alpha=-1)


def test_an_exception_comes_after_the_first_word_and_a_left_stream_is_counted() -> None:
    model = ScriptedDetoxiGen([StepError("broken"), "fine for ever after"])
    stream = model.stream("Hi")
    assert next(stream).text
    with pytest.raises(StepError, match="broken"):
        next(stream)
    left = model.stream("Hi")
    next(left)
    left.close()
    assert model.abandoned == 2
    broken, fine = ScriptedDetoxiGen([StepError("broken"), "fine"]).batch(["a", "b"], return_exceptions=True)
    assert isinstance(broken, StepError)
    assert fine.text == "fine"


def test_a_reply_may_say_how_it_ends() -> None:
    model = ScriptedDetoxiGen([Said("Half an", finish_reason="length"), Said("Well, then", error=StepError("broken"))])
    cut = model.generate("Hi")
    assert (cut.text, cut.finish_reason) == ("Half an", "length")
    stream, heard = model.stream("Hi"), list[str]()
    with pytest.raises(StepError, match="broken"):
        heard += (chunk.text for chunk in stream)
    assert [next(left).text for left in [model.stream("Hi")]] == ["Well, "]


def test_it_calls_a_tool() -> None:
    reply = ScriptedDetoxiGen([tool_call("opening", day="Monday", name="Sím")]).generate("When?")
    _, (call,), broken = parse_tool_calls(reply.text)
    assert (call.name, call.arguments, broken) == ("opening", {"day": "Monday", "name": "Sím"}, [])


async def test_held_requests_wait_and_may_be_cancelled() -> None:
    model = ScriptedDetoxiGen()
    with model.hold():
        tasks = [asyncio.create_task(model.agenerate("Hi")) for _ in range(2)]
        threaded = asyncio.create_task(asyncio.to_thread(model.generate, "Hi"))
        await asyncio.to_thread(model.wait_for, 3)
        assert not any(task.done() for task in (*tasks, threaded))
        tasks[0].cancel()
        await asyncio.to_thread(model.wait_for, 2)
        with pytest.raises(TimeoutError, match="2 requests"):
            model.wait_for(3, timeout_s=0.0)
    assert (await tasks[1]).text == (await threaded).text == "Hello, dear reader."
    assert (model.active, model.most_active, model.abandoned) == (0, 3, 1)


async def test_requests_that_must_be_together_are() -> None:
    model = ScriptedDetoxiGen(together=3)
    await asyncio.gather(*(model.agenerate("Hi") for _ in range(5)))
    assert model.most_active >= 3
    assert [reply.text for reply in ScriptedDetoxiGen(together=2).batch(["a", "b"])] == ["Hello, dear reader."] * 2
    assert len(await ScriptedDetoxiGen(together=2).abatch(["a", "b"])) == 2


def test_a_guard_works_on_it() -> None:
    policy = GuardPolicy(scorer=ScriptedScorer("rotten"))
    model = ScriptedDetoxiGen(["All is well. What a rotten day. Good night."])
    reply = model.generate("Hi", guard=policy)
    assert reply.text == "All is well. [removed]"
    assert (reply.finish_reason, reply.guard, len(reply.interventions)) == ("guard", "scripted", 1)
    with pytest.raises(GuardError):
        model.generate("Hi", guard=policy.replace(on_exhausted="raise"))


def test_it_goes_where_the_real_one_goes() -> None:
    """It has the ways of asking that `DetoxiGen` has, called alike; copies share it, and it is not pickled."""
    for name in ("generate", "stream", "batch", "agenerate", "astream", "abatch", "encode", "count_tokens", "close"):
        real, ours = (inspect.signature(getattr(kind, name)).parameters for kind in (DetoxiGen, ScriptedDetoxiGen))
        open_ended = any(one.kind is one.VAR_KEYWORD for one in real.values())  # the options of a whole batch
        assert open_ended or set(ours) <= set(real), name
    for name in ("model_id", "detoxifier_ids", "context_window", "has_chat_template", "supports_tools", "closed"):
        assert hasattr(DetoxiGen, name)
        assert hasattr(ScriptedDetoxiGen(), name)
    model = ScriptedDetoxiGen()
    assert len(model.streams) == len(model.detoxifier_ids)
    assert copy.deepcopy(model) is model
    with pytest.raises(NotPicklableError):
        pickle.dumps(model)
