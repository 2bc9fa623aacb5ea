"""The command line as real processes: Ctrl-C, and readers that leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from commands import PROMPT, start
from tiny import make_tiny_backbone
from waiting import wait_until

from detox_guard.cli.session import Exchange, run_all
from detox_guard.detoxigen import DetoxiGen
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_ctrl_c_keeps_the_text_on_the_terminal_and_ends_quietly(loaded: tuple[str, ...]) -> None:
    ours, theirs = os.openpty()
    process = start("generate", PROMPT, "--max-new-tokens", "4000", "--ignore-eos", *loaded, stdout=theirs)
    os.close(theirs)
    shown = b""
    while len(shown) < len(PROMPT) + 20:
        shown += os.read(ours, 64)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert PROMPT in shown.decode(errors="replace")
    assert shown.endswith(b"\n")
    assert errors.strip() == ""


def test_ctrl_c_in_a_batch_prints_what_there_is(loaded: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "t.html"
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": ""}\n{"prompt": "one"}\n{"prompt": "two"}\n')
    words = ("generate", "-f", file, "--json", "--max-new-tokens", "4000", "--ignore-eos", "--trace", page)
    process = start(*words, *loaded)
    assert process.stdout is not None
    assert "error" in json.loads(process.stdout.readline())  # so the others are being decoded
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["finish_reason"] for record in records] == ["interrupted", "interrupted"]


def test_ctrl_c_stops_a_chat_reply_only(loaded: tuple[str, ...]) -> None:
    words = ("chat", "--max-new-tokens", "3000", "--ignore-eos", "--seed", "1", *loaded)
    process = start(*words, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate("/alpha 1\n/quit\n", timeout=60)
    assert process.returncode == 0, errors
    assert "(stopped)" in out
    assert "α is 1." in out


def test_a_reader_that_leaves_is_no_error(loaded: tuple[str, ...]) -> None:
    decoding = ("--max-new-tokens", "40", "--ignore-eos")
    processes = [start("generate", *words, *decoding, *loaded) for words in (["one"], ["one", "two", "--json"])]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    for process in processes:
        assert process.stderr is not None
        errors = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=60) == 141
        assert errors == ""


def test_ctrl_c_leaves_what_was_decoded() -> None:
    with DetoxiGen(make_tiny_backbone("llama")) as model:
        params = DecodingParams(alpha=0.0, max_new_tokens=400, ignore_eos=True, seed=1)
        asked = [Exchange("one", params), Exchange("two", params)]
        main = threading.main_thread().ident
        assert main is not None
        interrupted, steps = threading.Event(), list[int]()

        def interrupt() -> None:
            wait_until(lambda: all(one.text for one in asked))
            signal.pthread_kill(main, signal.SIGINT)

        def interrupted_now(number: int, frame: FrameType | None) -> None:
            interrupted.set()  # not before: the replies could come to their ends first
            signal.default_int_handler(number, frame)

        def step(*_: object) -> None:
            steps.append(1)
            if len(steps) > 40:  # enough for some text of both, and far from their ends
                interrupted.wait(60)

        model.backbone.model.lm_head.register_forward_pre_hook(step)
        threading.Thread(target=interrupt).start()
        before = signal.signal(signal.SIGINT, interrupted_now)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_all(model, asked, quiet=True)
        finally:
            signal.signal(signal.SIGINT, before)
        assert not any(one.done for one in asked)
        wait_until(lambda: model.stats().seats == 0)
