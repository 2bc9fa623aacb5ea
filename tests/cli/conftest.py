"""A tiny model and a detoxifier for it, in folders, for all tests of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from commands import DEVICE
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard.detoxifiers.card import DetoxifierCard
from detox_guard.detoxifiers.soft_prompt import Detoxifier

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    config = make_tiny_config("llama", max_position_embeddings=4096, num_hidden_layers=1)
    make_tiny_model(config).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detoxifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random soft prompt for that model."""
    folder = tmp_path_factory.mktemp("detoxifiers") / "random"
    card = DetoxifierCard(base_id="tiny-chat", hidden_size=48, virtual_tokens=4, position="reply")
    Detoxifier(torch.randn(4, 48, generator=torch.Generator().manual_seed(0)), card).save(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model: Path, detoxifier: Path) -> tuple[str, ...]:
    return ("--model", str(model), "--detoxifier", str(detoxifier), *DEVICE)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text from rich and typer, and no page as wide as this terminal."""
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "DETOX_GUARD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    # set here first, so that what the command sets by default is taken back after the test
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
