"""What the tests of an evaluation share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from measuring import rtp_row
from tiny import SENTENCES

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [rtp_row(text, 0.9 if i % 2 else 0.1) for i, text in enumerate(SENTENCES)]
    path.write_text("\n".join([*rows, rtp_row("No label here", None), ""]))
    return path
