"""`detox-guard info`: what is installed, loaded and shipped. Knows facts to show; changes nothing but with --fetch."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

import detox_guard
from detox_guard.cli import options, session
from detox_guard.cli.console import exit_code, print_json, report, stdout_console
from detox_guard.errors import DetoxGuardError

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

__all__ = ["info"]

PACKAGES = ("torch", "transformers", "peft", "safetensors", "pydantic", "langchain-core", "llama-index-core")
NOT_FETCHED = "not fetched yet: detox-guard info --fetch"


@options.loading_options
def info(
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download and convert the embedded default model now.")
    ] = False,
    as_json: options.Json = False,
    model: options.Model = None,
    detoxifier: options.Detoxifiers = None,
    **fields: Any,
) -> None:
    """Versions, device, and facts of the backbone, the detoxifier and the scorer.

    The default model is described if it is here already; --fetch gets it.
    """
    from detox_guard.models.backbone import pick_device, pick_dtype
    from detox_guard.settings import EngineConfig

    loading = options.loading(fields)
    on_device = pick_device(loading.get("device"))
    in_dtype = pick_dtype(loading.get("dtype"), on_device)
    facts: dict[str, Any] = {
        "versions": {"detox-guard": detox_guard.__version__, "python": platform.python_version(), **_versions()},
        "device": str(on_device),
        "dtype": str(in_dtype).removeprefix("torch."),
    }
    errors: list[DetoxGuardError] = []
    backbone = None
    if model is not None or fetch or _is_here():
        try:
            loaded = session.load_model(
                model,
                steered=False,
                config=EngineConfig(pack_weights=False),  # packed ones are no parameters, and would not be counted
                **loading,
            )
            with loaded:
                backbone = loaded.backbone
            facts["backbone"] = _backbone(backbone)
        except DetoxGuardError as error:
            errors.append(error)
            facts["backbone"] = {"error": str(error)}
    else:
        facts["backbone"] = {"id": "the embedded default", "state": NOT_FETCHED}
    facts["detoxifiers"] = []
    for source in detoxifier or ["auto"]:
        try:
            facts["detoxifiers"] += _detoxifiers(source, backbone, model)
        except DetoxGuardError as error:
            errors.append(error)
            facts["detoxifiers"].append({"error": str(error)})
    try:
        facts["scorer"] = _scorer()
    except DetoxGuardError as error:
        errors.append(error)
        facts["scorer"] = {"error": str(error)}

    if as_json:
        print_json(json.dumps(facts, ensure_ascii=False))
    else:
        _show(facts)
    for failure in errors:
        report(failure)
    if errors:
        raise typer.Exit(max(exit_code(failure) for failure in errors))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _is_here() -> bool:
    """The default model can be had without a download."""
    from huggingface_hub import is_offline_mode

    from detox_guard.models.default import default_is_cached

    return default_is_cached() or is_offline_mode()


def _backbone(backbone: Backbone) -> dict[str, Any]:
    names = (
        "id",
        "revision",
        "hidden_size",
        "num_layers",
        "vocab_size",
        "max_positions",
        "window",
        "has_chat_template",
    )
    return {
        **{name: getattr(backbone, name) for name in names},
        **{name: value for name, value in backbone.identity.items() if name not in ("model", "revision")},
        **_size(backbone),
    }


def _size(backbone: Backbone) -> dict[str, Any]:
    if backbone.gguf is not None:
        facts = backbone.gguf.facts
        return {"class": f"llama.cpp: {facts.architecture}", "parameters": facts.parameters}
    model = backbone.model
    return {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def _detoxifiers(source: str, backbone: Backbone | None, model: str | None) -> list[dict[str, Any]]:
    """What `source` comes to: for "auto" that may be several. Without a backbone, the one it would be checked against,
    only the file is described."""
    from detox_guard.detoxifiers.resolve import AUTO, as_streams
    from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream

    if backbone is not None:
        streams = as_streams(source, backbone)
    elif source == AUTO and model is not None:
        return []  # nobody knows for a model that cannot be loaded
    elif source == AUTO:
        streams = (SteeringStream(Detoxifier.load(), source="shipped"),)
    else:
        streams = (SteeringStream(Detoxifier.load(source)),)
    return [
        {
            "serves": str(stream),
            **(
                stream.detoxifier.card.model_dump(mode="json", exclude_none=True)
                if isinstance(stream.detoxifier, Detoxifier)
                else {"text": stream.detoxifier.text}
            ),
            "sha256": stream.detoxifier.sha256,
        }
        for stream in streams
    ]


def _scorer() -> dict[str, Any]:
    from detox_guard.scorers.linear import EmbeddedScorer

    return EmbeddedScorer.load().card


def _show(facts: dict[str, Any]) -> None:
    """Sections of two columns; nested values are folded into a line each."""
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    sections: list[tuple[str, dict[str, Any]]] = [
        ("versions", facts["versions"]),
        ("device", {"device": facts["device"], "dtype": facts["dtype"]}),
        ("backbone", facts["backbone"]),
        *(("detoxifier", one) for one in facts["detoxifiers"]),
        ("scorer", facts["scorer"]),
    ]
    for title, section in sections:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=18, no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in section.items():
            for shown_name, shown in _rows(name, value):
                table.add_row(shown_name, Text(shown))
        console.print(title, style="bold")
        console.print(table)
        console.print()


def _rows(name: str, value: Any) -> list[tuple[str, str]]:
    label = name.replace("_", " ")
    if isinstance(value, dict):
        return [(label, ", ".join(f"{key} {_plain(one)}" for key, one in value.items()))]
    if isinstance(value, list):
        return [(label if i == 0 else "", _plain(one)) for i, one in enumerate(value)]
    return [(label, _plain(value))]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
