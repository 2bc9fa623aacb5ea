"""The server: models behind the HTTP interface that OpenAI's clients speak. Knows `DetoxiGen`, settings, results and
pages; knows no engine, no steering, no weights. Needs `pip install 'detox-guard[server]'`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detox_guard.server.app import create_app as create_app
    from detox_guard.server.config import ModelConfig as ModelConfig
    from detox_guard.server.config import ServerConfig as ServerConfig
    from detox_guard.server.config import ServerFile as ServerFile
    from detox_guard.server.loading import load_model as load_model
    from detox_guard.server.loading import params_of as params_of

_MODULES = dict.fromkeys(("ModelConfig", "ServerConfig", "ServerFile"), "config")
_MODULES |= {"create_app": "app", "load_model": "loading", "params_of": "loading"}
__all__ = ["ModelConfig", "ServerConfig", "ServerFile", "create_app", "load_model", "params_of"]


def __getattr__(name: str) -> object:
    """The command line reads the settings alone, so that it starts without FastAPI."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
