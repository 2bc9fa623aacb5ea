"""Files are whole or absent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from detox_guard import DataError
from detox_guard.files import prepare_file, write_whole

if TYPE_CHECKING:
    from pathlib import Path


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
