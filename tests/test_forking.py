"""A process that forks while its engines work: every child is answered at once, by a reply or by a named error."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from tiny import make_tiny_backbone, make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard import DecodingParams, DetoxiGen, Grammar, GuardPolicy
from detox_guard._forking import in_children, in_children_of, native_work
from detox_guard.text.llguidance import compile_grammar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
PARAMS = DecodingParams(alpha=0.0, max_new_tokens=6, ignore_eos=True, seed=1)
OBJECT = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})


def in_child(work: Callable[[], object]) -> str:
    """What `work` gives in a forked child, or the name of its error; "hung" if it takes a minute."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            said = str(work())
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode()[:1000])
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        return "hung" if os.WIFSIGNALED(status) else answer.read()


@pytest.fixture
def busy() -> Iterator[DetoxiGen]:
    """A guard that eight threads keep at work, plain, guarded and under a grammar."""
    with DetoxiGen(make_tiny_backbone("llama", initializer_range=0.2), params=PARAMS) as model:
        stop = threading.Event()

        def drive(i: int) -> None:
            while not stop.is_set():
                if i % 3 == 0:
                    model.generate("Hi")
                elif i % 3 == 1:
                    model.generate("Hi", guard=GuardPolicy())
                else:
                    model.generate("Hi", grammar=OBJECT, ignore_eos=False, max_new_tokens=20)
                model.stats()

        threads = [threading.Thread(target=drive, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        while model.stats().finished < 8:
            stop.wait(0.01)
        yield model
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_child_of_a_working_engine_is_told_at_once(busy: DetoxiGen) -> None:
    for _ in range(12):
        assert in_child(lambda: busy.generate("x")) == "EngineClosedError"
    assert in_child(lambda: busy.batch(["x", "y"])) == "EngineClosedError"
    assert (
        in_child(lambda: (busy.closed, busy.stats().seats, busy.stats().queued, busy.close())) == "(True, 0, 0, None)"
    )
    stream = busy.stream("x", max_new_tokens=400)
    next(stream)
    assert in_child(lambda: list(stream)) == "EngineClosedError"
    stream.close()
    assert busy.generate("x").finish_reason == "length", "the parent's goes on"


def test_an_engine_that_has_not_worked_yet_works_in_a_child(busy: DetoxiGen) -> None:
    with DetoxiGen(make_tiny_backbone("llama"), params=PARAMS) as fresh:
        for grammar in (None, OBJECT):
            for _ in range(5):
                ask = PARAMS.replace(grammar=grammar, ignore_eos=grammar is None, max_new_tokens=20)
                assert in_child(lambda ask=ask: fresh.generate("x", ask).finish_reason) in ("stop", "length")
        assert in_child(lambda: fresh.generate("x", guard=GuardPolicy()).finish_reason) == "length"
        assert fresh.generate("x").finish_reason == "length"


def test_a_child_loads_its_own_shared_model(busy: DetoxiGen, tmp_path: Path) -> None:
    make_tiny_model(make_tiny_config("llama")).save_pretrained(tmp_path / "tiny")
    make_tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    ours = DetoxiGen.shared(tmp_path / "tiny", detoxifier=())
    ours.generate("x", PARAMS)
    for _ in range(6):
        work = lambda: DetoxiGen.shared(tmp_path / "tiny", detoxifier=()).generate("x", PARAMS).finish_reason  # noqa: E731
        assert in_child(work) == "length"
    assert DetoxiGen.shared(tmp_path / "tiny", detoxifier=()) is ours
    ours.close()


def test_a_fork_inside_a_hook_of_the_engine_goes_on() -> None:
    answers: list[str] = []

    class Flagging:
        name = "flagging"

        def score(self, texts: list[str]) -> list[float]:
            return [1.0] * len(texts)

    def hook(event: object) -> None:
        if not answers:
            answers.append(in_child(lambda: "there"))

    with DetoxiGen(make_tiny_backbone("llama"), params=PARAMS) as model:
        model.generate("x", guard=GuardPolicy(scorer=Flagging(), on_event=hook, max_rewinds=0))
    assert answers == ["there"]


def test_locks_that_were_held_are_made_anew_while_their_owner_lives() -> None:
    class Owner:
        lock = threading.Lock()

        def renew(self) -> None:
            self.lock = threading.Lock()

    owner, gone = Owner(), Owner()
    counted: list[str] = []
    in_children_of(owner, Owner.renew)
    in_children_of(gone, lambda _: counted.append("gone"))
    in_children(lambda: counted.append("module"))
    del gone
    owner.lock.acquire()
    assert in_child(lambda: (owner.lock.acquire(timeout=5), counted)) == "(True, ['module'])"
    assert owner.lock.locked()


def test_bars_of_a_parent_that_loads_do_not_stop_a_child() -> None:
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    assert "tqdm.std" in sys.modules
    with tqdm.get_lock():
        thread_holds_it = lambda: tqdm.get_lock().acquire(timeout=5)  # noqa: E731
        inside: list[str] = []
        other = threading.Thread(target=lambda: inside.append(in_child(thread_holds_it)))
        other.start()
        other.join(90)
    assert inside == ["True"]


def test_a_fork_waits_for_native_work_and_native_work_for_a_fork() -> None:
    inside, go, steps = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        with native_work(), native_work():
            inside.set()
            go.wait(60)
            steps.append("worked")

    worker = threading.Thread(target=work)
    worker.start()
    inside.wait(60)
    threading.Timer(0.2, go.set).start()
    assert in_child(lambda: list(steps)) == "['worked']"
    worker.join(60)

    with native_work():  # the work of the thread that forks is its own
        assert in_child(lambda: native_work().__enter__()) == "None"


def test_a_fork_while_grammars_are_compiled(busy: DetoxiGen) -> None:
    with DetoxiGen(make_tiny_backbone("llama"), params=PARAMS) as fresh:
        ask = PARAMS.replace(grammar=OBJECT, ignore_eos=False, max_new_tokens=20)
        stop = threading.Event()

        def compile_grammars() -> None:
            while not stop.is_set():
                compile_grammar(OBJECT, busy.backbone, 20)

        threads = [threading.Thread(target=compile_grammars) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                assert in_child(lambda: fresh.generate("x", ask).finish_reason) in ("stop", "length")
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
