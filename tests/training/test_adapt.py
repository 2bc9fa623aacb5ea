"""`adapt`: a detoxifier for a tiny random model in a folder, from nothing, cut off, refused, and put on the hub."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from tiny import TEXTS, make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard import DetoxiGen
from detox_guard._files import hold_folder
from detox_guard.adapt import adapt
from detox_guard.detoxifiers import registry
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.errors import DataError, DetoxGuardError, InvalidParamsError
from detox_guard.models.load import load_backbone
from detox_guard.training.config import AdaptConfig
from detox_guard.training.data import Prompted, read_texts
from detox_guard.training.hub import fetch_comments
from detox_guard.training.rows import beginning, to_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows."""
    folder = tmp_path_factory.mktemp("adapt")
    make_tiny_model(make_tiny_config("llama", initializer_range=0.1)).save_pretrained(folder / "tiny")
    make_tiny_tokenizer().save_pretrained(folder / "tiny")
    for name, texts in (("toxic", TEXTS), ("harmless", [text.replace("mess", "joy") for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path / "cache"))


def asked(here: Path, output: Path, **changes: Any) -> dict[str, Any]:
    own = {"data": (str(here / "toxic.jsonl"),), "anchors": (str(here / "harmless.jsonl"),), "licence": "CC0-1.0"}
    small = {"steps": 6, "virtual_tokens": 4, "judges": ("embedded",), "device": "cpu"}
    return {"model": str(here / "tiny"), "output": str(output), **own, **small, **changes}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was done already")


class Hub:
    """What `huggingface_hub.HfApi` is to us."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def create_repo(self, repo_id: str, exist_ok: bool) -> str:
        assert exist_ok
        self.seen.append(repo_id)
        return f"hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
        self.seen.append((repo_id, folder_path, sorted(allow_patterns)))


def test_from_nothing_to_a_detoxifier(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detox_guard.training.own_pairs.SURELY_TOXIC", 0.0)
    monkeypatch.setattr("detox_guard.training.own_pairs.SURELY_HARMLESS", 1.0)
    out, said = tmp_path / "made", list[str]()
    made = adapt(AdaptConfig(**asked(here, out)), say=said.append, bars=False)
    card = made.detoxifier.card
    assert [source.name for source in card.data] == ["toxic.jsonl", "harmless.jsonl", "pairs.jsonl"]
    assert [source.licence for source in card.data] == ["CC0-1.0", "CC0-1.0", None]
    pairs = (out / "work" / "pairs.jsonl").read_text().splitlines()
    assert card.data[2].rows == len(pairs) >= 10
    assert f"{len(pairs)} pairs of its own replies" in card.notes
    assert (card.steps, card.base_id, card.virtual_tokens) == (6, "tiny", 4)
    assert card.start_sha256 == Detoxifier.load(out / "work" / "first").sha256
    assert card.command is not None
    assert card.command.startswith("detox-guard adapt tiny --data toxic.jsonl --anchors harmless.jsonl ")
    assert str(here) not in (out / "detoxifier_card.json").read_text() + (out / "README.md").read_text()
    assert [words.split(",")[0].split(" to ")[0] for words in said if "pairs" not in words] == [
        "first tuning", "its own replies", "second tuning", "measuring before and after",
    ]  # fmt: skip

    # the next start finds it
    backbone = load_backbone(here / "tiny", device="cpu")
    found = registry.find(backbone)
    assert found == made.entry.folder
    assert Detoxifier.load(found).sha256 == made.detoxifier.sha256
    with DetoxiGen.from_pretrained(here / "tiny", device="cpu") as model:
        (serving,) = model.detoxifiers
    assert "trained here" in serving
    readme = (found / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: peft\n")
    value = made.report.summary["groups"][0]["methods"]["plain"]["embedded:expected_max"]["value"]["value"]
    assert f"| plain | {value:.3f} [" in readme

    # the same call has nothing to do but what is new in it
    monkeypatch.setattr("detox_guard.training.trainer.train_detoxifier", never)
    monkeypatch.setattr("detox_guard.evaluation.run.run_eval", never)
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    pushed = adapt(AdaptConfig(**asked(here, out, push_to_hub="org/name")), bars=False)
    assert (pushed.pushed, pushed.detoxifier.sha256) == ("hub/org/name", made.detoxifier.sha256)
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "detoxifier_card.json"]
    assert hub.seen == ["org/name", ("org/name", str(out), files)]
    assert all((out / name).is_file() for name in files)
    assert 'detoxifier="org/name"' in (out / "README.md").read_text()
    assert pushed.detoxifier.card == card


def test_a_hub_that_refuses(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detox_guard.training.hub import push

    class Closed(Hub):
        def create_repo(self, repo_id: str, exist_ok: bool) -> str:
            raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", Closed)
    with pytest.raises(DetoxGuardError, match="org/name: not put on the hub: no network") as caught:
        push(tmp_path, "org/name")
    assert "hf auth login" in caught.value.hint


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="kills need a fork server")
def test_killed_in_each_phase_it_comes_to_the_same(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    target = importlib.import_module("killed").adapting

    def run(output: str, phase: str, count: int) -> int | None:
        own = asked(here, tmp_path / output, steps=12)
        process = context.Process(target=target, args=(own, str(tmp_path / f"cache-{output}"), phase, count))
        process.start()
        process.join()
        return process.exitcode

    for phase, count in (("first tuning", 2), ("its own replies", 1), ("second tuning", 9), ("decoding", 20)):
        assert run("cut", phase, count) == -9
        assert not (tmp_path / "cut" / "adapter_config.json").exists()
    assert [run("cut", "", 1), run("whole", "", 1)] == [0, 0]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert Detoxifier.load(cut).sha256 == Detoxifier.load(whole).sha256
    assert (cut / "work" / "pairs.jsonl").read_text() == (whole / "work" / "pairs.jsonl").read_text()
    assert replies_of(cut) == replies_of(whole)


def replies_of(folder: Path) -> dict[tuple[str, int, int], str]:
    rows = map(json.loads, (folder / "work" / "evaluation" / "samples.jsonl").read_text().splitlines())
    return {(row["method"], row["prompt"], row["sample"]): row["text"] for row in rows}


def test_what_cannot_be(here: Path, tmp_path: Path) -> None:
    for changes in ({"steps": 0}, {"minutes": 0.0}, {"push_to_hub": "name"}, {"judges": ()}, {"virtual_tokens": 0}):
        with pytest.raises(InvalidParamsError) as caught:
            AdaptConfig(**asked(here, tmp_path / "out", **changes))
        assert caught.value.field.startswith(next(iter(changes)))
    for name in ("data", "anchors"):
        with pytest.raises(InvalidParamsError, match="data and anchors, or neither"):
            adapt(AdaptConfig(**asked(here, tmp_path / "out", **{name: None})))
    with pytest.raises(InvalidParamsError, match="a folder that holds no model"):
        adapt(AdaptConfig(**asked(here, here / "tiny")))
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        adapt(AdaptConfig(**asked(here, tmp_path / "absent", data=(str(here / "absent.jsonl"),))))
    few = tmp_path / "few.txt"
    few.write_text("only\nfour\ndifferent\ntexts\n")
    with pytest.raises(DataError, match="4 different harmless texts"):
        adapt(AdaptConfig(**asked(here, tmp_path / "few", anchors=(str(few),))))


def test_a_folder_has_one_run_and_one_process(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    monkeypatch.setattr("detox_guard.training.trainer.train_detoxifier", stop)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        adapt(AdaptConfig(**asked(here, out)))
    with pytest.raises(DataError, match="holds a run with another seed") as caught:
        adapt(AdaptConfig(**asked(here, out, seed=1)))
    assert "--output" in caught.value.hint
    with pytest.raises(Stop):
        adapt(AdaptConfig(**asked(here, out)))
    with hold_folder(out / "work", "busy"), pytest.raises(DataError, match="another process is adapting a model in it"):
        adapt(AdaptConfig(**asked(here, out)))


@pytest.mark.parametrize(("minutes", "step_s", "steps"), [(45.0, 1.0, 240), (4.0, 2.0, 103), (0.5, 60.0, 20)])
def test_the_plan_is_as_long_as_the_minutes(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, step_s: float, steps: int
) -> None:
    """And it is made once."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detox_guard.training.trainer.train_detoxifier", stop)
    monkeypatch.setattr("detox_guard.training.trainer.seconds_a_step", lambda _: step_s)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            adapt(AdaptConfig(**asked(here, tmp_path / "out", steps=None, minutes=minutes)))
        plan = json.loads((tmp_path / "out" / "work" / "plan.json").read_text())
        assert plan["first"] + plan["second"] == pytest.approx(steps, abs=2)
        monkeypatch.setattr("detox_guard.training.trainer.seconds_a_step", never)


def test_a_step_is_timed(here: Path, tmp_path: Path) -> None:
    from detox_guard.training import TrainingConfig
    from detox_guard.training.trainer import seconds_a_step

    rows = {name: (str(here / f"{file}.jsonl"),) for name, file in (("data", "toxic"), ("anchors", "harmless"))}
    config = TrainingConfig(**rows, model=str(here / "tiny"), output=str(tmp_path), heldout=5, batch_size=2)  # type: ignore[arg-type]
    assert seconds_a_step(config) > 0
    assert list(tmp_path.iterdir()) == []


# Rows


def test_comments_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load_dataset(name: str, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        calls.append((name, split, streaming))
        yield from (
            {"text": f" {kind} comment of a fitting length, number {i} ", "toxicity": share}
            for i in range(9)
            for kind, share in (("a rude", 0.7), ("a calm", 0.05), ("an undecided", 0.4))
        )
        yield {"text": "short", "toxicity": 0.9}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    toxic, harmless = fetch_comments(3)
    assert toxic == [f"a rude comment of a fitting length, number {i}" for i in range(3)]
    assert harmless == [f"a calm comment of a fitting length, number {i}" for i in range(3)]
    assert calls == [("google/civil_comments", "train", True)]
    with pytest.raises(DataError, match="only 9 toxic and 9 harmless comments, 10 of each"):
        fetch_comments(10)


def test_without_a_network(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="google/civil_comments: cannot be fetched: no network") as caught:
        adapt(AdaptConfig(**asked(here, tmp_path / "out", data=None, anchors=None)))
    assert "--data and --anchors" in caught.value.hint


def test_beginnings_and_rows(tmp_path: Path) -> None:
    assert beginning("one two three four five six seven eight") == "one two three four"
    assert beginning("one two") == "one two"
    assert beginning(" ".join(map(str, range(30)))) == "0 1 2 3 4 5 6 7 8 9"
    assert beginning(Prompted("The bus", " is late")) == "The bus"
    texts = ("plain", Prompted("The bus", " is late"), Prompted("How is it?", "Late.", chat=True))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(to_json(text)) + "\n" for text in texts))
    assert read_texts(str(path)).texts == texts
