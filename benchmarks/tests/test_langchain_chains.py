"""The bench of chains and agents on a scripted model: figures, resuming, bad data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from detox_benchmarks.rag.langchain_chains import Answer, main

from detox_guard import DataError, Detoxifier, DetoxiGen
from detox_guard.testing import ScriptedDetoxiGen


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


def rude_if_it_read_rude(prompt: Any, params: Any) -> str:
    return "You stupid idiot." if "idiot" in str(prompt.messages) else "It opens at 7 o'clock."


def test_it_answers_measures_and_goes_on(
    data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detoxigen = ScriptedDetoxiGen(rude_if_it_read_rude)
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: detoxigen)
    main([*data, "--samples", "1", "--tasks", "rag"])
    assert len(detoxigen.calls) == 4
    out = Path(data[5])
    out.write_text(out.read_text() + '{"task": "ag')  # a line that was cut off
    main([*data, "--samples", "2"])
    assert len(detoxigen.calls) == 16  # two tasks, systems, questions and samples: nothing was asked twice
    rows = [Answer(**json.loads(line)) for line in out.read_text().splitlines()]
    assert len({(row.task, row.system, row.question, row.sample) for row in rows}) == len(rows) == 16
    for row in rows:
        (toxicity,) = row.toxicity.values()
        assert row.planted
        assert (toxicity > 0.5) == (row.system == "plain")
        assert (row.flagged > 0) == (row.system == "guarded")
    alphas = [params.alpha for _, _, params in detoxigen.calls]
    assert alphas.count(0.0) == 8
    assert {params.seed for _, _, params in detoxigen.calls} == {0, 1}
    assert sum(params.guard is not None for _, _, params in detoxigen.calls) == 4
    assert "| agent, guarded | 2 | 0." in capsys.readouterr().out


def test_it_asks_about_the_comments(data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    detoxigen = ScriptedDetoxiGen(rude_if_it_read_rude)
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: detoxigen)
    main([*data, "--samples", "1", "--tasks", "rag", "--systems", "plain", "--about", "comment"])
    assert all("reader's comment says" in str(prompt.messages) for _, prompt, _ in detoxigen.calls)
    assert len(detoxigen.calls) == 2


def test_it_goes_on_with_what_was_found(
    data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    detoxigen = ScriptedDetoxiGen(
        lambda prompt, _: "You stupid idiot." if "idiot" in prompt else "It opens at 7 o'clock."
    )
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: detoxigen)
    main([*data, "--samples", "1", "--about", "thread"])
    assert [prompt.rpartition("\n\n")[2][:17] for _, prompt, _ in detoxigen.calls] == ["Reader's comment."] * 4
    rows = [Answer(**json.loads(line)) for line in Path(data[5]).read_text().splitlines()]
    assert {row.task for row in rows} == {"rag"}
    assert all((row.toxicity["embedded"] > 0.5) == (row.system == "plain") for row in rows)
    with pytest.raises(SystemExit):
        main([*data, "--about", "thread", "--tasks", "agent"])
    assert "--tasks rag only" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [1, 3])
def test_bad_data_is_named(data: list[str], broken: int) -> None:
    path = Path(data[broken])
    path.write_text('{"data": 5}')
    with pytest.raises(DataError, match=path.name):
        main(data)


def test_what_a_run_is_gone_on_with(
    data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another judge, who sees the old answers too; not under other settings."""
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: ScriptedDetoxiGen(rude_if_it_read_rude))
    plain = [*data, *["--tasks", "rag", "--systems", "plain"]]
    main([*plain, "--samples", "1"])
    main([*plain, "--samples", "2", "--judge", "embedded", "--judge", "profanity-check"])
    assert "by embedded" in (shown := capsys.readouterr().out)
    assert "by profanity-check" in shown
    main([*plain, "--samples", "2"])
    for changes in (["--temperature", "0.9"], ["--seed", "5"], ["--model", "org/other"]):
        with pytest.raises(DataError, match="other settings"):
            main([*plain, *changes])
    other = Detoxifier.load()
    monkeypatch.setattr(Detoxifier, "load", lambda _: replace(other, embeddings=other.embeddings * 2))
    with pytest.raises(DataError, match="other settings"):  # what ships was trained anew
        main(plain)
