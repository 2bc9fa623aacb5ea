"""Command-line options from pydantic fields, so that no field is ever without one. Knows typer; knows no command.

Bounds are the fields' own: what a user typed goes to the pydantic class as it is, which names what it refuses.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from detox_guard.errors import InvalidParamsError
from detox_guard.models.options import OF_LLAMACPP, DtypeName, LoadOptions
from detox_guard.settings import DecodingParams, GuardPolicy

if TYPE_CHECKING:
    from detox_guard._strict import StrictModel

__all__ = [
    "NEEDS_TORCH",
    "AuditLog",
    "Command",
    "Detoxifiers",
    "Device",
    "Dtype",
    "DtypeName",
    "Guard",
    "GuardThreshold",
    "Json",
    "Model",
    "TemplateKwargs",
    "config_options",
    "decoding_options",
    "given",
    "guard_policy",
    "loading",
    "loading_options",
    "template_kwargs",
]

Command = Callable[..., None]

_LOADING = "What is loaded"
Model = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or .gguf file; else the embedded default model.", rich_help_panel=_LOADING),
]
Detoxifiers = Annotated[
    list[str] | None,
    typer.Option(
        "--detoxifier",
        help='Folder or hub id; repeat for several; else "auto": the shipped one for the default model, one trained '
        "here, or texts that need no training.",
        rich_help_panel=_LOADING,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N, mps; else the best there is.", rich_help_panel=_LOADING)
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="auto is as saved; else what the device does best.", rich_help_panel=_LOADING),
]
TemplateKwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-kwarg",
        metavar="NAME=JSON",
        help="Variable of the chat template, such as enable_thinking=false; repeat for several.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout, nothing else.")]

_FLAGS = {"stop_token_ids": "--stop-token-id", "quantization_config": "--quantize"}
_ONE_EACH = (
    "methods",
    "alphas",
    "judges",
    "lm_judges",
    "temperatures",
    "top_ps",
    "initial_texts",
    "systems",
    "scorers",
    "allowed_hosts",
    "cors_origins",
)
NEEDS_TORCH = frozenset({"engine", *OF_LLAMACPP})
"""Options of loading that a command leaves out which computes gradients."""
_AS_JSON = ("device_map", "max_memory", "quantization_config", "model_kwargs")
"""Options of loading that may be JSON objects."""

_GUARDING = "Guarding"
Guard = Annotated[
    bool,
    typer.Option(
        "--guard", help="Score each sentence before it is shown; decode again what fails.", rich_help_panel=_GUARDING
    ),
]
GuardThreshold = Annotated[
    float | None,
    typer.Option(help="Highest score that is let through (default 0.5); implies --guard.", rich_help_panel=_GUARDING),
]
AuditLog = Annotated[
    Path | None,
    typer.Option(help="Append what the guard did as JSON lines; implies --guard.", rich_help_panel=_GUARDING),
]


def template_kwargs(written: Sequence[str] | None) -> dict[str, Any]:
    """Variables of the chat template from `NAME=JSON`; what is no JSON is text. Raises `InvalidParamsError`."""
    kwargs: dict[str, Any] = {}
    for one in written or ():
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise InvalidParamsError("template-kwarg", one, "NAME=JSON, such as enable_thinking=false")
        try:
            kwargs[name] = json.loads(value)
        except (ValueError, RecursionError):
            kwargs[name] = value
    return kwargs


def guard_policy(guard: bool, threshold: float | None, audit_log: Path | None, **fields: Any) -> GuardPolicy | None:
    """The policy that the three options ask for; None where they ask for none."""
    if not (guard or threshold is not None or audit_log is not None):
        return None
    asked: dict[str, Any] = {"threshold": threshold, "audit_log": None if audit_log is None else str(audit_log)}
    return GuardPolicy(**{name: value for name, value in asked.items() if value is not None}, **fields)


def decoding_options(command: Command) -> Command:
    """The command, with options for all fields of `DecodingParams` that can be typed; they arrive in `**fields`."""
    return _with_options(command, DecodingParams, "Decoding", leave={"grammar", "trace", "trace_top", "guard"})


def loading_options(command: Command) -> Command:
    """The command, with an option for every field of `LoadOptions`; they arrive in `**fields`, for `loading` to take.

    A token is no option: other users of a machine can read its command lines.
    """
    return _with_options(command, LoadOptions, _LOADING, leave={"token"})


def loading(fields: dict[str, Any]) -> dict[str, Any]:
    """What was typed of `LoadOptions`, taken out of `fields`. Raises as `given`."""
    return given({name: fields.pop(name) for name in LoadOptions.model_fields if name in fields})


def config_options(
    source: type[StrictModel], *, leave: Set[str] = frozenset(), panel: str | None = None
) -> Callable[[Command], Command]:
    """The command, with an option for every field of a class of settings; they arrive in `**fields`.

    Where the class inherits `LoadOptions`, those have a panel of their own.
    """
    of_loading = set(LoadOptions.model_fields) if issubclass(source, LoadOptions) else set()

    def decorated(command: Command) -> Command:
        own = _with_options(command, source, panel, leave={*leave, *of_loading})
        return _with_options(own, LoadOptions, _LOADING, leave={*leave, "token"}) if of_loading else own

    return decorated


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the user typed; the rest is left to the class's own defaults. Raises `InvalidParamsError` for what is no
    JSON."""
    typed = {name: value for name, value in fields.items() if value is not None and value != []}
    for name in _AS_JSON:
        if str(typed.get(name, "")).startswith("{"):
            try:
                typed[name] = json.loads(typed[name])
            except (ValueError, RecursionError) as error:
                raise InvalidParamsError(name, typed[name], f"a JSON object: {error}") from None
    return typed


def _with_options(
    command: Command, source: type[StrictModel], panel: str | None, leave: Set[str] = frozenset()
) -> Command:
    """typer reads signatures, so the options are written into the command's. Their default is None, "not typed"; the
    help is the field's description, and shows the field's own default."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = []
    for name, field in source.model_fields.items():
        if name in leave:
            continue
        kind, default = _typed(name, field.annotation), field.default
        words = re.sub(r" \(`[^`]*`\)", "", " ".join((field.description or "").split()))  # modules: for editors
        required = default is PydanticUndefined
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if name in _ONE_EACH:  # a list is typed one by one
            flag = flag.removesuffix("s")
        if kind is bool and default is True:
            flag = f"{flag}/--no-{name.replace('_', '-')}"
        if get_origin(kind) is list:
            words += " Repeat for several."
        if not (required or default in (None, (), "", False)):
            words = f"{words.removesuffix('.')} (default {_shown(default)})."
        option = typer.Option(flag, help=words, rich_help_panel=panel)
        options.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else None,
                annotation=Annotated[kind if required else kind | None, option],
            )
        )
    made: Any = command
    made.__signature__ = signature.replace(parameters=[*own, *options])
    made.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
    return command


def _typed(name: str, annotation: Any) -> Any:
    """What typer is to read for a field: without bounds and None, any number of values as a list."""
    if name == "dtype":
        return DtypeName
    if name in _AS_JSON or annotation is Any:
        return str
    if get_origin(annotation) is Annotated:
        return _typed(name, get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (one,) = (part for part in get_args(annotation) if part is not NoneType)
        return _typed(name, one)
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        if parts[-1] is Ellipsis:
            return list[_typed(name, parts[0])]  # type: ignore[misc]
        return tuple[tuple(_typed(name, part) for part in parts)]  # type: ignore[misc]
    return annotation


def _shown(default: object) -> str:
    if isinstance(default, float):
        return f"{default:.3g}"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
