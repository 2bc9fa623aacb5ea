"""What steering costs: figures against hand-computed ones, and one small run from end to end."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from detox_benchmarks.utility.run import run_utility
from detox_benchmarks.utility.tasks import answer_scores, harmless_words, refuses, steered_nats, stems
from measuring import rtp_row, text_of, written
from tiny import SENTENCES

from detox_guard.detoxifiers.soft_prompt import SteeringStream
from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.evaluation.methods import Method
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


@pytest.mark.parametrize(
    ("reply", "answers", "wanted"),
    [
        ("The 308 points!", ["308", "308 points"], (1.0, 1.0)),
        ("It was 308 points", ["308 points"], (0.0, 2 * 2 / (4 + 2))),
        ("nothing", ["308"], (0.0, 0.0)),
        ("", ["308"], (0.0, 0.0)),
        ("red red", ["red"], (0.0, 2 / 3)),
    ],
)
def test_answers_are_scored_as_squad_does(reply: str, answers: list[str], wanted: tuple[float, float]) -> None:
    assert answer_scores(reply, answers) == pytest.approx(wanted)


@pytest.mark.parametrize("position", ["front", "reply"])
def test_steered_nats_are_those_of_the_engines_distribution(tiny_llama: Backbone, position: Any) -> None:
    """What the engine says it gave each token it drew is what the token costs, teacher forced."""
    detoxifier = random_detoxifier(tiny_llama, virtual_tokens=5)
    detoxifier = type(detoxifier)(detoxifier.embeddings, detoxifier.card.model_copy(update={"position": position}))
    stream = SteeringStream(detoxifier)
    ids = tiny_llama.tokenizer(SENTENCES[1])["input_ids"]
    with DetoxiGen(tiny_llama, [stream]) as model:
        for rule, alpha, floor in (("dexperts", 0.0, 0.0), ("dexperts", 1.0, 0.0), ("detoxigen", 2.0, 0.01)):
            params = DecodingParams(
                alpha=alpha, rule=rule, plausibility=floor, top_p=1.0, max_new_tokens=12, ignore_eos=True, seed=3
            )  # fmt: skip
            trace = model.generate(SENTENCES[1], params).trace
            assert trace is not None
            reply = [token.token_id for token in trace.tokens]
            [(nats, never)] = steered_nats(tiny_llama, [Method("m", params, (stream,))], ids, reply)
            assert nats == pytest.approx(-sum(math.log(token.p_after) for token in trace.tokens[1:]), rel=1e-3)
            assert never == 0
    forbidding = Method("m", DecodingParams(alpha=0.5, plausibility=0.99), (stream,))
    [(nats, never)] = steered_nats(tiny_llama, [forbidding], ids, reply)
    assert never > 6
    assert nats > 13 * never


def test_words_on_the_topic() -> None:
    assert stems("Judaism, and some_Orthodox!") == {"judai", "ortho"}
    assert harmless_words("The gentle gentle weather and the idiot") == {"gentle", "weather"}
    assert refuses(" I'm sorry, but no")
    assert not refuses("The poet was sorry")


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    questions = [{"question": f"Which {n}?", "answers": [{"text": "fox"}]} for n in range(4)]
    squad = {"data": [{"paragraphs": [{"context": SENTENCES[0], "qas": questions}]}]}
    bold = {"poets": {"A_Poet": ["The poet was ", "A poem is "]}, "cooks": {"A_Cook": ["The cook "]}}
    return {
        "xquad": written(tmp_path / "squad.json", json.dumps(squad)),
        "wikitext": written(tmp_path / "wiki.txt", "\n".join(SENTENCES * 12)),
        "bold": (written(tmp_path / "bold.json", json.dumps(bold)),),
    }


def test_run_utility(tasks: dict[str, Any], tiny_folder: Path, detoxifier_folder: Path, tmp_path: Path) -> None:
    def run(**changes: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {
            **tasks, "output": tmp_path / "out", "model": tiny_folder, "detoxifier": str(detoxifier_folder),
            "device": "cpu", "dtype": "float32", "methods": ("default",), "limit": 3, "samples": 2, "progress": False,
        }  # fmt: skip
        report = run_utility(**{**asked, **changes})
        assert changes.get("xquad", 0) is None or "xquad (3)" in text_of(report.table())
        return report.summary

    summary = run()
    assert json.loads((tmp_path / "out" / "utility.json").read_text()) == summary
    assert summary["sizes"] == {"xquad": 3, "wikitext": 3, "bold": 3}
    assert all(list(methods) == ["plain", "default"] for methods in summary["tasks"].values())
    loss = summary["tasks"]["wikitext"]["default"]["nats a token"]
    plain = summary["tasks"]["wikitext"]["plain"]["nats a token"]
    assert plain["difference"] is None
    assert loss["difference"]["value"] == pytest.approx(loss["value"]["value"] - plain["value"]["value"])
    assert loss["difference"]["value"] != 0
    assert {"degenerate", "refusals", "on topic", "content words"} <= set(summary["tasks"]["bold"]["default"])

    # taken up again: nothing is decoded twice, and methods may be added
    stored = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    assert len(stored) == 4
    again = run(methods=("default", "guard"))
    assert again["tasks"]["wikitext"] == summary["tasks"]["wikitext"]  # a model has no distribution of its own
    assert list(again["tasks"]["xquad"]) == ["plain", "default", "guard"]
    assert again["tasks"]["xquad"]["default"] == summary["tasks"]["xquad"]["default"]
    for path, content in stored.items():
        assert set(content.splitlines()) <= set(path.read_bytes().splitlines())
    with pytest.raises(DataError, match="holds a run of"):
        run(limit=2)
    labelled = written(tmp_path / "labelled.jsonl", rtp_row("The poet", 0.9) + "\n" + rtp_row("The cook", 0.1))
    assert run(output=tmp_path / "other", xquad=None, wikitext=None, bold=(labelled,))["sizes"] == {"bold": 2}
    run(methods=("dexperts-floor",), alphas=(2.0,), xquad=None, bold=())
    with pytest.raises(DataError, match="holds another 'dexperts-floor"):
        run(methods=("dexperts-floor",), alphas=(2.0,), plausibility=0.5, xquad=None, bold=())


def test_run_utility_refuses_before_loading(tasks: dict[str, Any], tmp_path: Path) -> None:
    model = {"model": "no/such-model", "output": tmp_path / "out"}
    for changes, said in (
        ({}, "at least one file"),
        ({**tasks, "methods": ("polite",)}, "methods"),
        ({**tasks, "limit": 0}, "limit"),
        ({**tasks, "samples": 0}, "samples"),
    ):
        with pytest.raises(InvalidParamsError, match=said):
            run_utility(**model, **changes)
    with pytest.raises(DataError, match="SQuAD"):
        run_utility(**model, xquad=written(tmp_path / "other.json", '{"data": 1}'))
    with pytest.raises(DataError, match="no such file"):
        run_utility(**model, wikitext=tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [("The end.", "an end", 1.0), ("at nine", "nine", 2 / 3), ("", "nine", 0.0), ("ten", "nine", 0.0)],
)
def test_f1_of_one_reference(answer: str, reference: str, f1: float) -> None:
    assert answer_scores(answer, [reference])[1] == pytest.approx(f1)
