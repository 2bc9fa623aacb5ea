"""What a server may be told: its bounds, its guard, its models; from Python, or from one TOML or YAML file.

Knows files and environment variables; knows no HTTP and loads no model.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator

from detox_guard._strict import StrictModel
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.settings import MAX_NEW_TOKENS, DecodingParams, EngineConfig, GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ModelConfig", "ServerConfig", "ServerFile", "is_loopback"]

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class ServerConfig(StrictModel):
    """How a server listens, whom it answers, and how much it takes. Raises `InvalidParamsError`."""

    host: str = "127.0.0.1"
    """Address to listen on. Another one than loopback needs API keys."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """Port to listen on. 0 takes a free one."""
    api_keys: str | None = None
    """File of hashed keys, a line each, as `detox-guard key NAME` writes them. Keys in the environment variable
    DETOX_GUARD_API_KEYS (with commas between them) count too."""
    guard: GuardPolicy | None = GuardPolicy()
    """Guard of every reply that asks for no other. In a file, `guard = false` is none."""
    allow_unguarded: bool | None = None
    """Whether a request may loosen its guard, switch it off, or ask for the text that was taken back. None: only on
    loopback without keys, where the one who asks is the one who serves. A stricter guard may always be asked for."""
    scorers: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    """Scorers that `/v1/moderations` offers besides the guard's, which comes first."""
    playground: bool = True
    """Serve the page at `/`. It holds no secret; with keys, it asks for one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which it may be asked (the Host header), against pages that point their own name at this machine. None
    given: on loopback those of loopback, else any."""
    cors_origins: tuple[str, ...] = ()
    """Other sites whose pages may ask, such as https://chat.example.org."""
    max_body_bytes: Annotated[int, Field(ge=1024, le=1_000_000_000)] = 1_048_576
    """Longest request, in bytes."""
    max_messages: Count = 512
    """Most messages of one chat, and most texts of one request."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 4096
    """Longest reply that may be asked for, in tokens."""
    max_choices: Annotated[int, Field(ge=1, le=128)] = 8
    """Most replies of one request: prompts times `n`."""
    max_requests: Count = 128
    """Requests under way. The next one is refused with 429."""
    max_requests_per_key: Count = 64
    """Requests under way of one key."""
    body_timeout_s: Seconds = 30.0
    """Time in which a request has to arrive."""
    write_timeout_s: Seconds = 30.0
    """Time in which a client has to take a piece of an answer. One that does not is let go."""
    ping_s: Seconds = 15.0
    """A stream that has nothing to say for so long says that it is alive (a comment, which clients skip)."""
    drain_s: Seconds = 30.0
    """After SIGTERM, replies under way have so long to come to their end; then they end with an error."""
    log_text: bool = False
    """Write prompts and replies to the log."""
    telemetry: bool = False
    """OpenTelemetry traces (extra `otel`); where they go, the OTEL_… variables say."""

    @field_validator("guard", mode="before")
    @classmethod
    def _false_is_none(cls, value: object) -> object:
        return None if value is False else value

    @field_validator("scorers", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _lists(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class ModelConfig(StrictModel):
    """One model of a server: what is loaded, and how it decodes."""

    model: str | None = None
    """Hub id, folder or file; None is the embedded default. With `upstream`, its name there; None is the first one."""
    upstream: str | None = None
    """Another endpoint of OpenAI's form, such as http://127.0.0.1:11434/v1, whose replies are guarded. Nothing is
    loaded, and nothing steered."""
    upstream_key: Annotated[str | None, Field(repr=False)] = None
    """Key for it; else the environment variable DETOX_GUARD_UPSTREAM_KEY."""
    detoxifier: Annotated[tuple[str, ...], Field(max_length=16)] | None = None
    """Detoxifiers; None is the shipped one, an empty list is none at all."""
    loading: dict[str, Any] = Field(default_factory=dict)
    """Fields of `LoadOptions`: device, dtype, revision, …"""
    params: DecodingParams | None = None
    """Defaults of every request."""
    engine: EngineConfig = EngineConfig(when_full="refuse")
    """Bounds of its engine."""

    @field_validator("detoxifier", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


class ServerFile(StrictModel):
    """A configuration file: `[server]`, and a table `[models.NAME]` for each model; the first one is the default."""

    server: ServerConfig = ServerConfig()
    """The server."""
    models: Annotated[dict[str, ModelConfig], Field(min_length=1, max_length=64)] = Field(
        default_factory=lambda: {"default": ModelConfig()}
    )
    """Models by the name that clients use."""

    @classmethod
    def read(cls, path: str | Path, environ: Mapping[str, str] | None = None) -> Self:
        """From a .toml, .yaml or .yml file. `${NAME}` in a string is an environment variable, `${NAME:-word}` one with
        a default. Raises `DataError` for a file that cannot be read, `InvalidParamsError` for what is wrong in it.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: {error}", hint="give a TOML or YAML file") from error
        told = _filled(_parsed(path.name, text), os.environ if environ is None else environ)
        try:
            return cls.model_validate_json(json.dumps(told))
        except ValidationError as error:
            raise InvalidParamsError.from_pydantic(error) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, InvalidParamsError):
                raise
            raise DataError(f"{path.name}: {error}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can ask there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parsed(name: str, text: str) -> Any:
    if name.endswith((".yaml", ".yml")):
        import yaml

        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise DataError(f"{name}: {error}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{name}: {error}") from None


def _filled(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with its variables put in. Raises `InvalidParamsError` for one that is not set."""

    def variable(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name not in environ and default is None:
            raise InvalidParamsError(name, None, "set in the environment", hint="or write ${NAME:-default}")
        return environ.get(name, default or "")

    if isinstance(value, str):
        return _VARIABLE.sub(variable, value)
    if isinstance(value, dict):
        return {str(key): _filled(one, environ) for key, one in value.items()}
    return [_filled(one, environ) for one in value] if isinstance(value, list) else value
