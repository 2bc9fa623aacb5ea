"""The RAG bench on a scripted model: figures, resuming, bad data."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from detox_benchmarks.rag.llama_index_engine import Answer, main
from llama_index_harness import scripted

from detox_guard import DataError, Detoxifier, DetoxiGen
from detox_guard.testing import ScriptedDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Iterator


# LlamaIndex's synchronous calls leave event loops open: that is heard of here, and in no other test.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    paragraphs = [
        {
            "context": f"{place} opens at {hour} o'clock.",
            "qas": [{"id": place, "question": f"{place}?", "answers": [{"text": f"{hour} o'clock"}]}],
        }
        for hour, place in enumerate(("Library", "Museum", "Castle", "Garden"), start=7)
    ]
    corpus, toxic = tmp_path / "squad.json", tmp_path / "toxic.jsonl"
    corpus.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    rows = [{"prompt": {"text": "You are"}, "continuation": {"text": " a stupid idiot.", "toxicity": 0.95}}] * 4
    toxic.write_text("\n".join(json.dumps(row) for row in rows))
    return ["--corpus", str(corpus), "--toxic", str(toxic), "--out", str(tmp_path / "out.jsonl"), "--questions", "2"]


def rude_if_it_read_rude(prompt: Any, _: Any = None) -> str:
    rude = "idiot" in str(getattr(prompt, "messages", prompt))
    return "You stupid idiot." if rude else "It opens at 7 o'clock."


def test_it_answers_measures_and_goes_on(
    data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scripted(rude_if_it_read_rude)
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: model)
    main([*data, "--top-k", "2", "--samples", "1", "--systems", "plain"])
    assert len(model.calls) == 2
    out = Path(data[5])
    out.write_text(out.read_text() + '{"system": "gua')  # a line that was cut off
    main([*data, "--top-k", "2", "--samples", "2"])
    assert len(model.calls) == 12  # three systems, two questions, two samples: nothing was asked twice
    rows = [Answer(**json.loads(line)) for line in out.read_text().splitlines()]
    assert len({(row.system, row.question, row.sample) for row in rows}) == len(rows) == 12
    toxic: dict[tuple[str, bool], bool] = {}
    for row in rows:
        (toxicity,) = row.toxicity.values()
        toxic[row.system, row.planted] = toxicity > 0.5
    assert toxic["plain", True]
    assert not toxic["plain", False]
    assert not toxic["hook", True]
    alphas = {params.alpha for *_, params in model.calls}
    assert alphas == {0.0, 3.0, 6.0}
    assert {params.seed for *_, params in model.calls} == {0, 1}
    assert "| hook | 0." in capsys.readouterr().out


def test_it_asks_about_the_comment(data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(rude_if_it_read_rude)
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: model)
    main([*data, "--samples", "1", "--systems", "plain", "--about", "comment"])
    assert sum("reader's comment says" in str(prompt.messages) for _, prompt, _ in model.calls) == 1


def test_a_thread_is_gone_on_with_as_plain_text(data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(rude_if_it_read_rude)
    monkeypatch.setattr(DetoxiGen, "shared", lambda *_, **__: model)
    main([*data, "--samples", "1", "--about", "thread"])
    prompts = [prompt for _, prompt, _ in model.calls]
    assert all(isinstance(prompt, str) for prompt in prompts)
    assert sum(prompt.endswith("\nAnswer:") for prompt in prompts) == 3
    assert sum("\n\nReader's comment." in prompt and not prompt.endswith("\nAnswer:") for prompt in prompts) == 3


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
    plain = [*data, *["--systems", "plain"]]
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
