"""`detox-guard detoxifiers`: what was trained on this machine. Knows the registry's entries and how to show them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detox_guard.cli import options  # noqa: TC001  (typer reads it)
from detox_guard.cli.console import print_json, stdout_console

if TYPE_CHECKING:
    from detox_guard.detoxifiers.registry import Entry

__all__ = ["detoxifiers"]


def detoxifiers(
    show: Annotated[str | None, typer.Argument(help="One of them, by name: its card and its figures.")] = None,
    remove: Annotated[str | None, typer.Option("--remove", help="Forget the one of this name.")] = None,
    as_json: options.Json = False,
) -> None:
    """The detoxifiers that `adapt` made on this machine; one in full; or one removed."""
    from detox_guard.detoxifiers import registry
    from detox_guard.errors import DetoxifierNotFoundError, InvalidParamsError

    if show is not None and remove is not None:
        raise InvalidParamsError("--remove", remove, "a name to show or one to remove, not both")
    if remove is not None:
        registry.remove(remove)
        if as_json:
            print_json(json.dumps({"removed": remove}))
        else:
            print(f"removed {remove}")
        return
    entries = registry.entries()
    if show is not None:
        found = [entry for entry in entries if entry.name == show]
        if not found:
            hint = f"registered: {', '.join(entry.name for entry in entries) or 'none'}"
            raise DetoxifierNotFoundError(f"{show}: no detoxifier of that name was registered", hint=hint)
        _show(found[0], as_json)
    elif as_json:
        for entry in entries:
            print_json(json.dumps(_facts(entry), ensure_ascii=False))
    else:
        _list(entries)


def _facts(entry: Entry) -> dict[str, Any]:
    return {**entry.model_dump(mode="json"), "folder": str(entry.folder)}


def _show(entry: Entry, as_json: bool) -> None:
    from detox_guard.detoxifiers.soft_prompt import Detoxifier

    card = Detoxifier.load(entry.folder).card
    readme = entry.folder / "README.md"
    figures = readme.read_text(encoding="utf-8") if readme.is_file() else None
    if as_json:
        facts = {**_facts(entry), "card": card.model_dump(mode="json", exclude_none=True), "readme": figures}
        print_json(json.dumps(facts, ensure_ascii=False))
        return
    from rich.markdown import Markdown
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=18, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {**_facts(entry), "steps": card.steps, "command": card.command, "notes": card.notes}.items():
        table.add_row(name.replace("_", " "), Text("–" if value is None else str(value)))
    console = stdout_console()
    console.print(table)
    if figures is not None:
        _, _, body = figures.removeprefix("---").partition("---\n")  # behind what only the hub reads
        console.print()
        console.print(Markdown(body))


def _list(entries: list[Entry]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not entries:
        print("none yet; detox-guard adapt MODEL makes one")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("name", "base", "revision", "registered", "where"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        cells = (entry.name, entry.base_id, entry.base_revision or "–", entry.registered, str(entry.folder))
        table.add_row(*map(Text, cells))
    stdout_console().print(table)
