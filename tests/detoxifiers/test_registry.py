"""The registry of detoxifiers that were trained on this machine."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import pytest
from harness import random_detoxifier
from tiny import make_tiny_backbone

from detox_guard import Detoxifier
from detox_guard.detoxifiers import registry
from detox_guard.errors import DetoxifierError, DetoxifierMismatchError, DetoxifierNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "detoxifiers"


def saved(backbone: Backbone, folder: Path, seed: int = 7) -> Path:
    random_detoxifier(backbone, seed=seed).save(folder)
    return folder


def test_what_was_registered_is_found_again(cache: Path, tmp_path: Path, tiny_llama: Backbone) -> None:
    assert registry.find(tiny_llama) is None
    assert registry.entries() == []
    folder = saved(tiny_llama, tmp_path / "made")
    (folder / "README.md").write_text("# Figures\n")
    entry = registry.register(folder, tiny_llama)
    found = registry.find(tiny_llama)
    assert found == entry.folder
    assert found.is_relative_to(cache)
    assert Detoxifier.load(found).sha256 == Detoxifier.load(folder).sha256 == entry.sha256
    assert (found / "README.md").read_text() == "# Figures\n"
    assert registry.entries() == [entry]
    assert (entry.base_id, entry.base_revision) == (tiny_llama.id, tiny_llama.revision)


@pytest.mark.parametrize("change", [{"revision": "another"}, {"hidden_size": 32}, {"num_layers": 9}, {"id": "another"}])
def test_another_base_finds_nothing(
    cache: Path, tmp_path: Path, tiny_llama: Backbone, change: dict[str, object]
) -> None:
    registry.register(saved(tiny_llama, tmp_path / "made"), tiny_llama)
    assert registry.find(dataclasses.replace(tiny_llama, **change)) is None


def test_a_hub_id_and_its_copy_are_one_base(cache: Path, tmp_path: Path, tiny_llama: Backbone) -> None:
    registry.register(saved(tiny_llama, tmp_path / "made"), tiny_llama)
    assert registry.find(dataclasses.replace(tiny_llama, id=f"org/{tiny_llama.id.title()}")) is not None


def test_a_second_training_takes_the_place_of_the_first(cache: Path, tmp_path: Path, tiny_llama: Backbone) -> None:
    first = registry.register(saved(tiny_llama, tmp_path / "one"), tiny_llama)
    second = registry.register(saved(tiny_llama, tmp_path / "two", seed=8), tiny_llama)
    assert registry.entries() == [second]
    assert registry.find(tiny_llama) == second.folder != first.folder
    assert not first.folder.exists()
    again = registry.register(saved(tiny_llama, tmp_path / "two", seed=8), tiny_llama)
    assert again.folder == second.folder
    assert registry.find(tiny_llama) == second.folder


def test_one_for_another_base_is_not_registered(cache: Path, tmp_path: Path, tiny_llama: Backbone) -> None:
    other = make_tiny_backbone("gpt2")
    with pytest.raises(DetoxifierMismatchError, match="tiny-gpt2"):
        registry.register(saved(other, tmp_path / "made"), tiny_llama)
    assert registry.entries() == []


@pytest.mark.parametrize("cut", ["no entry yet", "half an entry", "no folder", "half a folder"])
def test_what_was_cut_off_is_passed_over(
    cache: Path, tmp_path: Path, tiny_llama: Backbone, caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    entry = registry.register(saved(tiny_llama, tmp_path / "made"), tiny_llama)
    file = cache / f"{entry.name}.json"
    if cut == "no entry yet":
        file.unlink()
    elif cut == "half an entry":
        file.write_text(file.read_text()[:40])
    elif cut == "half a folder":
        (entry.folder / "adapter_config.json").unlink()
    else:
        for one in entry.folder.iterdir():
            one.unlink()
    with caplog.at_level(logging.WARNING, "detox_guard.detoxifiers"):
        assert registry.find(tiny_llama) is None
        assert registry.entries() == []
    assert bool(caplog.records) == (cut != "no entry yet")
    assert registry.register(tmp_path / "made", tiny_llama) in registry.entries()


def test_removed(cache: Path, tmp_path: Path, tiny_llama: Backbone) -> None:
    entry = registry.register(saved(tiny_llama, tmp_path / "made"), tiny_llama)
    registry.remove(entry.name)
    assert registry.find(tiny_llama) is None
    assert not entry.folder.exists()
    with pytest.raises(DetoxifierNotFoundError) as refused:
        registry.remove(entry.name)
    assert refused.value.hint == "registered: none"
    with pytest.raises(DetoxifierNotFoundError):
        registry.remove("../outside")


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tmp_path: Path, tiny_llama: Backbone) -> None:
    cache.parent.mkdir()
    cache.write_text("a file stands where the folder should")
    with pytest.raises(DetoxifierError, match="cannot be registered"):
        registry.register(saved(tiny_llama, tmp_path / "made"), tiny_llama)
