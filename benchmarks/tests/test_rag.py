"""Both benches of retrieval on a scripted model: figures, resuming, bad data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from detox_benchmarks.__main__ import app
from detox_benchmarks.rag.frame import Answer
from typer.testing import CliRunner

from detox_guard import Detoxifier, DetoxiGen
from detox_guard.testing import ScriptedDetoxiGen

if TYPE_CHECKING:
    from typer.testing import Result

PLAIN = {"langchain": "rag, plain", "llama-index": "plain"}


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    paragraphs = [
        {
            "context": f"The {place} opens at {hour} o'clock.",
            "qas": [{"id": place, "question": f"The {place}?", "answers": [{"text": f"{hour} o'clock"}]}],
        }
        for hour, place in enumerate(("library", "museum", "castle", "garden"), start=7)
    ]
    corpus, toxic = tmp_path / "squad.json", tmp_path / "toxic.jsonl"
    corpus.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    rows = [{"prompt": {"text": "You are"}, "continuation": {"text": " a stupid idiot.", "toxicity": 0.95}}] * 4
    toxic.write_text("\n".join(json.dumps(row) for row in rows))
    return ["--corpus", str(corpus), "--toxic", str(toxic), "--out", str(tmp_path / "out.jsonl"), "--questions", "2"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedDetoxiGen:
    """Rude if it read something rude."""

    def said(prompt: Any, _: Any) -> str:
        rude = "idiot" in str(getattr(prompt, "messages", prompt))
        return "You stupid idiot." if rude else "It opens at 7 o'clock."

    scripted = ScriptedDetoxiGen(said)
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: scripted)
    return scripted


def run(bench: str, *words: str) -> Result:
    return CliRunner().invoke(app, ["rag", bench, *words])


def rows_of(data: list[str]) -> list[Answer]:
    return [Answer(**json.loads(line)) for line in Path(data[5]).read_text().splitlines()]


@pytest.mark.parametrize(
    ("bench", "systems", "every"),
    [
        ("langchain", ("rag, plain", "rag, guarded", "agent, plain", "agent, guarded"), 1),
        ("llama-index", ("plain", "guarded", "hook"), 2),
    ],
)
def test_it_answers_measures_and_goes_on(
    bench: str, systems: tuple[str, ...], every: int, data: list[str], model: ScriptedDetoxiGen
) -> None:
    first = run(bench, *data, "--samples", "1", "--system", systems[0])
    assert first.exit_code == 0, first.output
    assert len(model.calls) == 2
    out = Path(data[5])
    out.write_text(out.read_text() + '{"system": "gua')  # a line that was cut off
    shown = run(bench, *data, "--samples", "2").stdout
    wanted = len(systems) * 2 * 2
    assert len(model.calls) == wanted  # nothing was asked twice
    rows = rows_of(data)
    assert len({(row.system, row.question, row.sample) for row in rows}) == len(rows) == wanted
    assert sum(row.planted for row in rows) == wanted / every
    for row in rows:
        assert (row.toxicity["embedded"] > 0.5) == (row.planted and row.system.endswith("plain"))
        assert not (row.flagged and row.system.endswith("plain"))
    assert {params.seed for _, _, params in model.calls} == {0, 1}
    assert sum(params.alpha == 0 for _, _, params in model.calls) == 4 * sum("plain" in name for name in systems)
    assert f"| {systems[-1]} | {2 // every} | 0." in shown


@pytest.mark.parametrize("bench", list(PLAIN))
def test_it_asks_about_the_comment(bench: str, data: list[str], model: ScriptedDetoxiGen) -> None:
    run(bench, *data, "--samples", "1", "--system", PLAIN[bench], "--about", "comment")
    asked = sum("reader's comment says" in str(call.prompt.messages) for call in model.calls)
    assert (asked, len(model.calls)) == (2 if bench == "langchain" else 1, 2)


@pytest.mark.parametrize("bench", list(PLAIN))
def test_a_thread_is_gone_on_with_as_plain_text(bench: str, data: list[str], model: ScriptedDetoxiGen) -> None:
    run(bench, *data, "--samples", "1", "--system", PLAIN[bench], "--about", "thread")
    ends = [call.prompt.rpartition("\n\n")[2] for call in model.calls]
    assert all(end.startswith("Reader's comment.") or end.endswith("\nAnswer:") for end in ends)
    assert len(ends) == 2


def test_what_is_refused(data: list[str], model: ScriptedDetoxiGen) -> None:
    refused = run("langchain", *data, "--about", "thread", "--system", "agent, plain")
    assert refused.exit_code == 2
    assert "an agent needs a chat" in refused.stderr
    assert "systems: 'other'" in run("llama-index", *data, "--system", "other").stderr
    for at in (1, 3):
        path = Path(data[at])
        kept = path.read_text()
        path.write_text('{"data": 5}')
        assert path.name in run("llama-index", *data).stderr
        path.write_text(kept)
    assert not model.calls


def test_what_a_run_is_gone_on_with(data: list[str], model: ScriptedDetoxiGen, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another judge, who sees the old answers too; not under other settings."""
    plain = [*data, "--system", "plain"]
    run("llama-index", *plain, "--samples", "1")
    shown = run("llama-index", *plain, "--judge", "embedded", "--judge", "profanity-check").stdout
    assert "by embedded" in shown
    assert "by profanity-check" in shown
    assert run("llama-index", *plain).exit_code == 0
    for changes in (["--temperature", "0.9"], ["--seed", "5"], ["--model", "org/other"]):
        assert "other settings" in run("llama-index", *plain, *changes).stderr
    other = Detoxifier.load()
    monkeypatch.setattr(Detoxifier, "load", lambda _: replace(other, embeddings=other.embeddings * 2))
    assert "other settings" in run("llama-index", *plain).stderr  # what ships was trained anew
