"""Files are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from detox_guard import DataError
from detox_guard._files import (
    prepare_file,
    prepare_folder,
    read_json,
    read_regular,
    read_text,
    usable_path,
    write_whole,
)


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    target.write_text("old")
    link.symlink_to(target)
    for write in (prepare_file, lambda path: write_whole(path, "new")):
        for path in (pipe, tmp_path):
            with pytest.raises(DataError, match="is no file"):
                write(path)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    with pytest.raises(DataError, match="surrogates"):
        write_whole(target, "\udce9")
    assert target.read_text() == "new"


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    write_whole(page, "old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(DataError, match="disk full"):
        write_whole(page, "new")
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for path in (tmp_path, file / "inside"):
        with pytest.raises(DataError, match="cannot be written"):
            prepare_file(path)
    prepare_file(tmp_path / "new" / "folder" / "page.html")


ODD_NAMES = ["a" * 5000, "a/" * 5000, "a\0b", "\ud800", "~nosuchuser/x", 3, None, b"bytes", ["a"], 1.5]
"""What no file system has."""


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: repr(name)[:12])
def test_names_that_no_file_has_are_errors_of_ours_everywhere(name: Any, tmp_path: Path) -> None:
    from detox_guard import BackboneError, Detoxifier, DetoxifierError, InvalidParamsError
    from detox_guard.evaluation.prompts import read_prompts
    from detox_guard.models.load import load_backbone
    from detox_guard.training.data import read_texts

    with pytest.raises(BackboneError):
        usable_path(name, BackboneError)
    for use in (read_texts, read_prompts, read_text, read_json, prepare_file, prepare_folder):
        with pytest.raises(DataError):
            use(name)
    with pytest.raises(DataError):
        write_whole(name, "x")
    if name is not None:
        with pytest.raises((BackboneError, InvalidParamsError)):
            load_backbone(name)
        with pytest.raises(DetoxifierError):
            Detoxifier.load(name)
    with pytest.raises(DetoxifierError):
        Detoxifier.load().save(name)


def test_usable_names_are_given_back_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert usable_path("~/x") == tmp_path / "x"
    assert usable_path(tmp_path / "absent" / "file") == tmp_path / "absent" / "file"
    (tmp_path / "file").write_text("x")
    assert usable_path(str(tmp_path / "file" / "below")) == tmp_path / "file" / "below"


def test_what_is_no_regular_file_is_never_waited_for(tmp_path: Path) -> None:
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / "link"
    file.write_bytes(b"12345")
    os.mkfifo(pipe)
    link.symlink_to(file)
    assert read_regular(file, 5) == b"12345"
    for path in (pipe, link, tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(DataError):
            read_regular(path, 5)
    with pytest.raises(DataError, match="larger than 4"):
        read_regular(file, 4)


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 5000, "{", ""])
def test_json_that_is_none_or_too_deep(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match="not JSON"):
        read_json(tmp_path / "file")


def test_a_circle_of_links_is_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="cannot be written"):
        write_whole(tmp_path / "a", "x")
