"""`detox-guard chat`: turns, commands, and the guard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from commands import DEVICE, PROMPT, rows, run
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_chat_keeps_the_history_and_obeys_commands(loaded: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], float]] = []
    from detox_guard.detoxigen import DetoxiGen

    stream = DetoxiGen.stream

    def watched(self: DetoxiGen, prompt: Any, params: Any) -> Any:
        seen.append(([message["role"] for message in prompt], params.alpha))
        return stream(self, prompt, params)

    monkeypatch.setattr(DetoxiGen, "stream", watched)
    said = "hello\n\nand you?\n/alpha 4\n/system be kind\nhi\n/reset\nagain\n/quit\nnever read\n"
    result = run("chat", "--max-new-tokens", "8", "--seed", "3", "--ignore-eos", *loaded, stdin=said)
    assert result.exit_code == 0, result.stderr
    assert seen == [
        (["user"], 3.0),
        (["user", "assistant", "user"], 3.0),
        (["system", "user"], 4.0),
        (["system", "user"], 4.0),
    ]


def test_chat_goes_on_after_an_error_and_says_so_at_the_end(loaded: tuple[str, ...]) -> None:
    said = "/alpha lots\n/alpha 1000\n/nonsense\n" + "long " * 5000 + "\nhi\n"
    result = run("chat", "--max-new-tokens", "5", *loaded, stdin=said)
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 4
    assert result.stdout.strip()


def test_chat_refuses_what_is_no_text_and_goes_on(loaded: tuple[str, ...]) -> None:
    result = run("chat", "--max-new-tokens", "4", *loaded, stdin=b"caf\xe9\nhello\n")
    assert "without lone surrogates" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert result.stdout.strip()


def test_chat_compare_shows_both(loaded: tuple[str, ...]) -> None:
    result = run("chat", "--compare", "--max-new-tokens", "5", *loaded, stdin="hi\n")
    assert result.exit_code == 0
    assert "steered" in result.stdout
    assert "plain" in result.stdout


def test_guard_options(loaded: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    words = ("generate", PROMPT, "--seed", "1", "--max-new-tokens", "12", *loaded)
    plain = run(*words, "--json")
    guarded = run(*words, "--json", "--guard-threshold", "0.0001", "--audit-log", log, "--compare")
    (record,) = rows(guarded)
    assert record["steered"]["text"] == rows(plain)[0]["text"]
    assert record["finish_reason"] == "guard"
    assert record["text"] == "[removed]"
    assert record["usage"]["discarded_tokens"] > 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["action"] for line in lines] == [event["action"] for event in record["interventions"]]
    shown = run(*words, "--guard-threshold", "0.0001", "--compare")
    assert all(name in shown.stdout for name in ("plain", "steered", "guarded", "rewinds", "[removed]"))
    talk = run("chat", "--guard", "--max-new-tokens", "5", *loaded, stdin="hi\n")
    assert talk.exit_code == 0, talk.stderr
    refused = run(*words, "--guard-threshold", "2")
    assert refused.exit_code == 2
    assert "threshold" in refused.stderr


def test_chat_needs_a_template(tmp_path: Path) -> None:
    make_tiny_model(make_tiny_config("gpt2")).save_pretrained(tmp_path)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    result = run("chat", "--model", tmp_path, "--alpha", "0", *DEVICE, stdin="hi\n")
    assert result.exit_code == 3
    assert "no chat template" in result.stderr
    assert result.stdout == ""
