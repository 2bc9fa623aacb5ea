"""`detox-guard serve` and `detox-guard key`. Knows options and configuration files; leaves serving to
`detox_guard.server`."""

from __future__ import annotations

import os
import sys
from pathlib import Path  # noqa: TC003  (typer reads annotations when it runs)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detox_guard.cli import options, session
from detox_guard.errors import DataError
from detox_guard.server.config import ModelConfig, ServerConfig, ServerFile
from detox_guard.server.keys import new_key
from detox_guard.settings import DecodingParams, GuardPolicy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from detox_guard.server.models import Model
    from detox_guard.server.state import State

__all__ = ["key", "serve"]


@options.config_options(ServerConfig, leave={"guard"}, panel="Serving")
@options.decoding_options
@options.loading_options
def serve(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="TOML or YAML file; read again on SIGHUP. Other options come before it."),
    ] = None,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            help="Load nothing: guard the model of this endpoint of OpenAI's form. --model is its name there.",
            rich_help_panel="What is loaded",
        ),
    ] = None,
    no_guard: Annotated[bool, typer.Option("--no-guard", help="Guard nothing.", rich_help_panel="Guarding")] = False,
    guard_threshold: options.GuardThreshold = None,
    audit_log: options.AuditLog = None,
    **fields: Any,
) -> None:
    """Serve the model to OpenAI's clients, guarded, with a page to try it at http://127.0.0.1:8000."""
    with session.needs_extra("server", "serving"):
        from detox_guard.server.logs import log_to_stderr
        from detox_guard.server.run import Server
    typed = {name: fields.pop(name) for name in list(fields) if name in ServerConfig.model_fields}
    loading = options.loading(fields)
    params = options.given(fields)
    changes = options.given({"model": model, "upstream": upstream})
    changes |= {"detoxifier": tuple(detoxifier)} if detoxifier else {}
    changes |= {name: given for name, given in (("loading", loading), ("params", params)) if given}
    read = _Reader(config, typed, _guard(no_guard, guard_threshold, audit_log), changes)
    file = read()
    held = {name: (one, _loaded(one, file.server.guard)) for name, one in file.models.items()}
    models = {_name(name, loaded): loaded for name, (_, loaded) in held.items()}

    async def reload(state: State) -> None:
        from detox_guard._threads import run_off_loop

        anew = read()
        fresh = {}
        for name, one in anew.models.items():
            same = name in held and held[name][0] == one
            fresh[name] = held[name] if same else (one, await run_off_loop(_loaded, one, anew.server.guard))
        state.configure(anew.server.replace(host=state.config.host, port=state.config.port))
        held.clear()
        held.update(fresh)
        state.models.replace({_name(name, loaded): loaded for name, (_, loaded) in fresh.items()})

    server = Server(models, file.server, reload=None if config is None else reload, on_ready=_tell)
    log_to_stderr()
    if file.server.telemetry:
        from detox_guard.server.telemetry import export_traces

        export_traces()
    server.run()


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; logs tell it.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="File of hashed keys to add it to.")],
) -> None:
    """Make an API key: printed once, here; the file gets its hash."""
    made, line = new_key(name)
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as out:
            out.write(line + "\n")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    print(made)


class _Reader:
    """Reads the configuration, as often as it is asked to, and puts over it what was typed."""

    def __init__(self, path: Path | None, typed: dict[str, Any], guard: dict[str, Any], model: dict[str, Any]) -> None:
        self._path, self._typed, self._guard, self._model = path, options.given(typed), guard, model

    def __call__(self) -> ServerFile:
        file = ServerFile() if self._path is None else ServerFile.read(self._path)
        server = file.server.replace(**self._typed, **self._over(file.server.guard))
        return file.replace(server=server, models=self._given(file.models))

    def _given(self, models: Mapping[str, ModelConfig]) -> dict[str, ModelConfig]:
        """With the model that was typed, or what was typed of it."""
        if not self._model:
            return dict(models)
        if len(models) > 1:
            raise DataError("one model was given beside a file with several", hint="write it into the file")
        ((name, one),) = models.items()
        changes = dict(self._model)
        if "loading" in changes:
            changes["loading"] = {**one.loading, **changes["loading"]}
        if "params" in changes:
            changes["params"] = (one.params or DecodingParams()).replace(**changes["params"])
        return {name: one.replace(**changes)}

    def _over(self, guard: GuardPolicy | None) -> dict[str, Any]:
        if self._guard.get("guard", True) is None:
            return {"guard": None}
        return {"guard": (guard or GuardPolicy()).replace(**self._guard)} if self._guard else {}


def _guard(no_guard: bool, threshold: float | None, audit_log: Path | None) -> dict[str, Any]:
    if no_guard:
        return {"guard": None}
    asked = {"threshold": threshold, "audit_log": None if audit_log is None else str(audit_log)}
    return {name: value for name, value in asked.items() if value is not None}


def _loaded(one: ModelConfig, guard: GuardPolicy | None) -> Model:
    if one.upstream is None:
        from detox_guard.server.loading import load_model

        with session.loading_spinner(one.model):
            return load_model(one, guard)
    from detox_guard.server.upstream import Upstream

    behind = Upstream(one.upstream, one.model, key=one.upstream_key or os.environ.get("DETOX_GUARD_UPSTREAM_KEY"))
    behind.params = behind.params if one.params is None else behind.params.replace(**_set(one.params))
    return behind


def _set(params: DecodingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.model_fields_set}


def _name(name: str, loaded: Model) -> str:
    """A file's name for it; the model's own where there is no file."""
    return loaded.model_id if name == "default" else name


def _tell(url: str) -> None:
    print(f"Serving at {url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
