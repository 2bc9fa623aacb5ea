"""The audit log: one handler a file, no open files, no line of a model's making, nothing lost without a word."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from guarding import PARAMS, Scripted, fickle

from detox_guard import DetoxiGen, GuardPolicy, InvalidParamsError, aguard_text, guard_text
from detox_guard.guard import audit as audit_module
from detox_guard.guard.audit import audit_log, check_log

if TYPE_CHECKING:
    from collections.abc import Sequence

BAD = "A bad day. "


class BadWord:
    name = "bad-word"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [float("bad" in text) for text in texts]


def policy(log: object, **changes: Any) -> GuardPolicy:
    return GuardPolicy(scorer=BadWord(), audit_log=str(log), context_chars=0, **changes)


def replaced(*texts: str, under: GuardPolicy) -> str:
    return "".join(guard_text(texts, under))


def test_one_handler_a_file_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "b.log").symlink_to(tmp_path / "there" / "a.log")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setenv("HOME", str(tmp_path))
    spelt = ("a.log", "./a.log", "../there/a.log", str(tmp_path / "link" / "a.log"), "~/there/a.log", "b.log")
    assert len({id(audit_log(path)) for path in spelt}) == 1
    for path in spelt:
        assert replaced(BAD, under=policy(path)) == "[removed] "
    assert len(Path("a.log").read_text(encoding="utf-8").splitlines()) == len(spelt)


def test_any_number_of_logs_keeps_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "MOST_LOGS", 20)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(50):
        replaced(BAD, under=policy(tmp_path / f"{i}.log"))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    gc.collect()
    assert sum(type(one) is audit_module.AuditLog for one in gc.get_objects()) <= 20
    assert all(len((tmp_path / f"{i}.log").read_text().splitlines()) == 1 for i in range(50))


def test_no_line_is_of_a_model_s_making(tmp_path: Path) -> None:
    forged = '{"time": "2020-01-01", "action": "none"}'
    for mark in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029":
        replaced(f"A bad{mark}{forged}{mark} day", under=policy(tmp_path / "a.log", keep_discarded=True))
    replaced("A bad \ud800 day", under=policy(tmp_path / "a.log", keep_discarded=True))
    lines = (tmp_path / "a.log").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 11
    assert {json.loads(line)["action"] for line in lines} == {"replace"}
    assert any(forged in json.loads(line)["text"] for line in lines)


def test_it_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_MAX_BYTES", 1000)
    for _ in range(20):
        replaced(BAD, under=policy(tmp_path / "a.log"))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.log", *(f"a.log.{i}" for i in range(1, len(files)))]
    assert len(files) > 2
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert sum(len(path.read_text().splitlines()) for path in tmp_path.iterdir()) == 20


def unwritable(tmp_path: Path, kind: str) -> str:
    os.mkfifo(tmp_path / "pipe")
    return {
        "folder": str(tmp_path),
        "nowhere": str(tmp_path / "no" / "such.log"),
        "pipe": str(tmp_path / "pipe"),
        "null": "a\0b",
        "long": "x" * 5000,
        "empty": "",
        "below a file": f"{__file__}/a.log",
    }[kind]


@pytest.mark.parametrize("kind", ["folder", "nowhere", "pipe", "null", "long", "empty", "below a file"])
def test_a_log_that_cannot_be_written_is_an_error_at_once(tmp_path: Path, kind: str) -> None:
    bad = policy(unwritable(tmp_path, kind))

    async def nothing() -> Any:
        yield "Fine."

    for ask in (
        lambda: check_log(str(bad.audit_log)),
        lambda: guard_text([], bad),
        lambda: aguard_text(nothing(), bad),
    ):
        with pytest.raises(InvalidParamsError) as caught:
            ask()
        assert caught.value.field == "audit_log"


def test_a_full_disk_is_told_and_hurts_no_reply(caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert replaced(BAD, "Fine.", under=policy("/dev/full")) == "[removed] Fine."
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name.startswith("detox_guard")
    assert "No space left" in record.message
    assert '"action": "replace"' in record.message  # the line itself


def test_a_line_that_does_not_fit_spoils_no_other(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    child = os.fork()
    if child == 0:
        try:
            line = len(json.dumps({"seed": None})) + 200
            resource.setrlimit(resource.RLIMIT_FSIZE, (line * 3 // 2, resource.RLIM_INFINITY))
            for _ in range(4):
                replaced(BAD, under=policy(log))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            replaced(BAD, under=policy(log))
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lines = log.read_text(encoding="utf-8").splitlines()
    assert 1 < len(lines) < 5
    assert all(json.loads(line)["action"] == "replace" for line in lines)


def test_a_log_that_goes_away_hurts_no_reply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    held = guard_text([BAD, "Fine. ", BAD, "And on."], policy(folder / "a.log"))
    assert next(held) == "[removed] "
    (folder / "a.log").unlink()
    folder.rmdir()
    assert "".join(held) == "Fine. [removed] And on."
    assert "cannot be written" in caplog.text


def test_hooks_that_fail_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Any) -> None:
        raise KeyError("mine")

    async def pieces() -> Any:
        yield BAD
        yield "Fine."

    async def joined() -> str:
        return "".join([text async for text in aguard_text(pieces(), policy(tmp_path / "a.log", on_event=fail), fail)])

    assert "".join(guard_text([BAD, "Fine."], policy(tmp_path / "a.log", on_event=fail), fail)) == "[removed] Fine."
    assert asyncio.run(joined()) == "[removed] Fine."
    assert caplog.text.count("on_event raised") == 4
    assert len((tmp_path / "a.log").read_text().splitlines()) == 2


# -- on a model


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
