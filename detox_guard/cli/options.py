"""Command-line options from pydantic fields, so that no field is ever without one. Knows typer; knows no command.

Bounds are the fields' own: what a user typed goes to the pydantic class as it is, which names what it refuses.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic_core import PydanticUndefined

from detox_guard.errors import InvalidParamsError
from detox_guard.params import DecodingParams
from detox_guard.policy import GuardPolicy, Rule
from detox_guard.training.config import TrainingConfig

if TYPE_CHECKING:
    from detox_guard.checked import Checked

__all__ = [
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
    "Revision",
    "TemplateKwargs",
    "TrustRemoteCode",
    "decoding_options",
    "given",
    "guard_policy",
    "template_kwargs",
    "training_options",
]

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Command = Callable[..., None]

_LOADING = "What is loaded"
Model = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or .gguf file; else the embedded default model.", rich_help_panel=_LOADING),
]
Detoxifiers = Annotated[
    list[str] | None,
    typer.Option(
        "--detoxifier", help="Folder or hub id; repeat for several; else the shipped one.", rich_help_panel=_LOADING
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N, mps; else the best there is.", rich_help_panel=_LOADING)
]
Dtype = Annotated[DtypeName | None, typer.Option(help="Else what the device does best.", rich_help_panel=_LOADING)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", rich_help_panel=_LOADING)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code of the model's repository.", rich_help_panel=_LOADING)
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

# field: (runtime type, help). "trace" is asked for by the commands themselves.
_DECODING: Mapping[str, tuple[Any, str]] = {
    "alpha": (float, "Strength of the steering; 0 is the plain model."),
    "calm_share": (float, "Share of it behind prompts with nothing toxic in them; 1 is all of it behind all."),
    "rule": (Rule, "Formula that mixes the streams."),
    "plausibility": (float, "Only tokens with at least this share of the best token's probability."),
    "temperature": (float, "0 is greedy."),
    "top_p": (float, "Nucleus."),
    "top_k": (int, "0 is off."),
    "repetition_penalty": (float, "1 is off."),
    "max_new_tokens": (int, "Longest reply."),
    "seed": (int, "Repeats a reply; else a fresh one is drawn."),
    "stop": (list[str], "Text that ends the reply; repeat for several."),
    "stop_token_ids": (list[int], "Token id that ends the reply; repeat for several."),
    "ignore_eos": (bool, "Go on past the model's own end tokens."),
}
_FLAGS = {"stop_token_ids": "--stop-token-id"}

_TRAINING: Mapping[str, tuple[Any, str]] = {
    "data": (list[str], "Toxic texts: .jsonl, .csv, .tsv, .txt or hub set org/name[:split]; repeat for several."),
    "output": (str, "Folder of the detoxifier."),
    "model": (str, "Hub id, folder or .gguf file; else the embedded default model."),
    "revision": (str, "Branch, tag or commit on the hub."),
    "contexts": (list[str], "Neutral texts for user turns and passages; repeat for several."),
    "anchors": (list[str], "Harmless texts on which the soft prompt must not differ from the backbone; repeat."),
    "anchor_weight": (float, "Weight of KL(p_gen‖p_detox) on the anchors."),
    "pairs": (list[str], "Rows with a toxic and a neutral text that say the same; repeat for several."),
    "pair_weight": (float, "Weight of the preference loss on the pairs."),
    "position": (Literal["front", "reply"], "Where the virtual tokens stand."),
    "virtual_tokens": (int, "Length of the soft prompt."),
    "initial_text": (str, "Text whose embeddings it starts from."),
    "start": (str, "Folder of a detoxifier to go on from."),
    "steps": (int, "Optimizer steps."),
    "batch_size": (int, "Texts a step."),
    "reply_tokens": (int, "Longest reply, in tokens."),
    "passage_tokens": (tuple[int, int], "Shortest and longest passage."),
    "mixture": (tuple[float, float, float, float], "Shares of bare, split, chat and passage batches."),
    "learning_rate": (float, "Peak of the cosine schedule."),
    "seed": (int, "Of the order, the layouts and the split."),
    "heldout": (int, "Rows that are only measured on."),
    "max_bad_rows": (int, "Unusable rows a file may have."),
    "text_field": (str, "Column or key of the text."),
    "checkpoint_steps": (int, "How often the run can be resumed from."),
    "resume": (bool, "Take up a run of the same settings that was cut off."),
    "device": (str, "cpu, cuda, mps; else the best there is."),
    "dtype": (DtypeName, "Else what the device does best."),
    "licence": (str, "Licence of the data, for the card."),
    "notes": (str, "For the card."),
}

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
    """The command, with options for all fields of `DecodingParams` but `trace` and `guard`; they come in `**fields`."""
    return _with_options(command, DecodingParams, _DECODING, "Decoding")


def training_options(command: Command) -> Command:
    """The command, with an option for every field of `TrainingConfig`; they arrive in `**fields`."""
    return _with_options(command, TrainingConfig, _TRAINING, None)


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the user typed; the rest is left to the class's own defaults."""
    return {name: value for name, value in fields.items() if value is not None and value != []}


def _with_options(
    command: Command, source: type[Checked], table: Mapping[str, tuple[Any, str]], panel: str | None
) -> Command:
    """typer reads signatures, so the options are written into the command's. Their default is None, "not typed"; the
    help shows the field's own."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = []
    for name, (kind, words) in table.items():
        default = source.model_fields[name].default
        required = default is PydanticUndefined
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if kind is bool and default is True:
            flag = f"{flag}/--no-{name.replace('_', '-')}"
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


def _shown(default: object) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
