"""What an ablation may be told, and which detoxifiers it trains. Knows settings and rows of text; trains nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from detox_guard._files import write_whole
from detox_guard._strict import StrictModel
from detox_guard.detoxifiers.card import Position
from detox_guard.errors import DataError, InvalidParamsError
from detox_guard.settings import Rule
from detox_guard.training.config import TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.models.backbone import Backbone

__all__ = ["AblationConfig", "Tuning", "Variant", "check_config", "check_room", "make_variants"]

What = Literal["tuning", "tokens", "initial-text", "size", "sampling", "placement"]
Tuning = Literal["prompt", "lora", "full"]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

_DEFAULTS = TrainingConfig.model_fields
_INITIAL_TEXTS: tuple[str, ...] = (
    _DEFAULTS["initial_text"].default,
    "The museum opens at nine in the morning and closes at six in the evening.",
    "text",
)
_TRAIN: tuple[What, ...] = ("tuning", "tokens", "initial-text", "size", "placement")
_DECODE: tuple[What, ...] = ("tuning", "tokens", "initial-text", "size", "sampling")
_DECODING = ("rule", "alphas", "temperatures", "top_ps", "judges", "samples", "max_new_tokens")
_ONLY: dict[str, tuple[What, ...]] = {
    **dict.fromkeys(("data", "contexts", "text_field", "steps", "batch_size", "reply_tokens"), _TRAIN),
    **dict.fromkeys(("heldout", "mixture", "prompt_rate"), _TRAIN),
    **dict.fromkeys(("lora_rate", "full_rate", "lora_rank"), ("tuning",)),
    "position": ("tuning", "tokens", "initial-text", "size"),
    "virtual_tokens": ("tokens",),
    "initial_texts": ("initial-text",),
    "rows": ("size",),
    "passage_tokens": ("placement",),
    "pairs": ("placement",),
    "detoxifier": ("sampling", "placement"),
}
"""Settings that say something to some ablations only."""
_SAME = (
    "data", "contexts", "text_field", "model", "device", "dtype", "position", "batch_size", "reply_tokens", "heldout",
    "mixture", "seed",
)  # fmt: skip
"""Settings that a training has under the same name."""


class AblationConfig(StrictModel):
    """One ablation: `what` is varied, `output` the folder of the run; see `run_ablation`.

    - "tuning": prompt tuning against LoRA of rank `lora_rank` on the attention's projections and full fine-tuning, each
      at its own learning rate (`prompt_rate`, `lora_rate`, `full_rate`);
    - "tokens", "initial-text", "size": soft prompts of `virtual_tokens`, from `initial_texts`, on `rows` training rows
      (as many as there are), all else alike;
    - "placement": soft prompts before everything and before the reply, and `detoxifier`, if one is given;
      KL(p_gen‖p_detox) along held-out rows, bare, behind the chat template, and behind passages of `passage_tokens`
      tokens, and along `pairs`, at most `limit` of a file's, how much more the toxic text is favoured; with `prompts`
      their continuations too, bare, as user turns, and behind such passages without a template;
    - "sampling": the shipped `detoxifier`, or one that is given, without training.

    Raises `InvalidParamsError`.
    """

    what: What
    """Which ablation; a setting that says nothing to it is refused."""
    output: str
    """Folder of the run; a run cut off is taken up there."""
    data: tuple[str, ...] = ()
    """Toxic texts, as in train."""
    prompts: str | None = None
    """As in eval; non-toxic ones are left out. placement: if wanted."""
    contexts: tuple[str, ...] | None = None
    """Neutral texts, as in train; else a few that are built in."""
    pairs: str | None = None
    """placement: toxic and neutral texts, as in train."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Of both."""
    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    detoxifier: str | None = None
    """Folder or hub id. sampling: else the shipped one; placement: one more row."""
    device: str | None = None
    """cpu, cuda, cuda:N, mps; else the best there is."""
    dtype: str | None = None
    """Number type of the weights; else what the device does best."""
    position: Position = "reply"
    """As in train."""
    steps: Count | None = None
    """Optimizer steps; else 60, and 300 for size."""
    batch_size: Count = 8
    """Texts a step."""
    reply_tokens: Count = 32
    """Longest text, in tokens."""
    heldout: Count = 32
    """Rows that are only measured on."""
    mixture: tuple[Fraction, Fraction, Fraction, Fraction] = _DEFAULTS["mixture"].default
    """As in train."""
    prompt_rate: Rate = 2e-2
    """Learning rate of prompt tuning."""
    lora_rate: Rate = 1e-3
    """tuning: learning rate of LoRA."""
    full_rate: Rate = 5e-5
    """tuning: learning rate of full fine-tuning."""
    lora_rank: Count = 8
    """tuning: rank of LoRA."""
    virtual_tokens: Annotated[tuple[Count, ...], Field(min_length=1)] = (5, 20, 50, 100)
    """tokens: a length."""
    initial_texts: Annotated[tuple[str, ...], Field(min_length=1)] = _INITIAL_TEXTS
    """initial-text: a text."""
    rows: Annotated[tuple[Count, ...], Field(min_length=1)] = (500, 2000, 8000)
    """size: training rows."""
    passage_tokens: Annotated[tuple[Count, ...], Field(min_length=1)] = (150, 600, 2000)
    """placement: a length."""
    rule: Rule = "dexperts"
    """As in generate."""
    alphas: Annotated[tuple[Rate, ...], Field(min_length=1)] | None = None
    """Strength; else 2, and 1, 2, 4 for sampling."""
    temperatures: Annotated[tuple[Rate, ...], Field(min_length=1)] | None = None
    """Else 1, and .7, 1 for sampling."""
    top_ps: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] | None = None
    """Else .9, and .9, 1 for sampling."""
    judges: Annotated[tuple[str, ...], Field(min_length=1)] = ("embedded",)
    """A toxicity scorer."""
    samples: Count = 4
    """Replies a prompt."""
    max_new_tokens: Count = 20
    """Longest reply."""
    limit: Count = 30
    """Prompts, or pairs."""
    batch_rows: Annotated[int, Field(ge=2, le=4096)] = 64
    """Rows of the running batch."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the training, the prompts and the replies."""

    def grid(self) -> tuple[tuple[float, ...], list[tuple[float, float]]]:
        """Alphas, and pairs of a temperature and a top-p."""
        alphas, temperatures, top_ps = (
            ((1.0, 2.0, 4.0), (0.7, 1.0), (0.9, 1.0)) if self.what == "sampling" else ((2.0,), (1.0,), (0.9,))
        )
        warm, nuclei = self.temperatures or temperatures, self.top_ps or top_ps
        return self.alphas or alphas, [(temperature, top_p) for temperature in warm for top_p in nuclei]


@dataclass(frozen=True)
class Variant:
    """One detoxifier to train, on `learned` of `rows`. `training.output` is its folder; `own_file`: `training` reads
    the rows from a file that is still to be written, and holds some of them out."""

    name: str
    tuning: Tuning
    training: TrainingConfig
    rows: tuple[str, ...]
    learned: int
    own_file: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.training.output)

    def write_rows(self) -> None:
        """Write the file of its own, if it reads one."""
        if self.own_file:
            lines = (json.dumps({self.training.text_field: text}, ensure_ascii=False) + "\n" for text in self.rows)
            write_whole(Path(self.training.data[0]), "".join(lines))


def check_config(config: AblationConfig) -> None:
    """Raise `InvalidParamsError` for what this ablation needs and lacks, and for what says nothing to it."""
    for name, allowed in _ONLY.items():
        value = getattr(config, name)
        if config.what not in allowed and value != type(config).model_fields[name].default:
            raise InvalidParamsError(name, value, f"only for ablate {', '.join(allowed)}")
    if config.what == "placement" and config.prompts is None:
        for name in _DECODING:
            if (value := getattr(config, name)) != type(config).model_fields[name].default:
                raise InvalidParamsError(name, value, "only with prompts")
    if config.what in _TRAIN and not config.data:
        raise InvalidParamsError("data", None, "at least one source of toxic texts")
    if config.what in _DECODE and config.prompts is None:
        raise InvalidParamsError("prompts", None, "a file of prompts, or a hub data set")


def check_room(config: AblationConfig, backbone: Backbone) -> None:
    """Raise `InvalidParamsError` where a passage would not fit, or has no chat to stand in: before training."""
    if config.what == "placement" and not backbone.has_chat_template:
        raise InvalidParamsError("model", backbone.id, "a model with a chat template")
    bounds = [bound for bound in (backbone.max_positions, backbone.window) if bound is not None]
    asked = max(config.passage_tokens) + _DEFAULTS["virtual_tokens"].default + config.reply_tokens
    if config.what == "placement" and bounds and asked > min(bounds):
        bound = f"with virtual and reply tokens at most {min(bounds)} positions"
        raise InvalidParamsError("passage_tokens", max(config.passage_tokens), bound)


def make_variants(config: AblationConfig, texts: Sequence[str]) -> tuple[list[Variant], list[str]]:
    """The variants in order, and the rows that none of them learns from. Raises `DataError`, `InvalidParamsError`."""
    if config.what == "sampling":
        return [], []
    from detox_guard.training.rows import divide

    fields = {name: getattr(config, name) for name in _SAME}
    steps = config.steps or (300 if config.what == "size" else 60)
    base = TrainingConfig(**fields, output=config.output, steps=steps, learning_rate=config.prompt_rate)
    rows, heldout = divide(list(texts), base)

    def variant(name: str, folder: str, tuning: Tuning = "prompt", **changes: Any) -> Variant:
        own = base.replace(output=str(Path(config.output) / folder), **changes)
        return Variant(name, tuning, own, tuple(rows), len(rows))

    if config.what == "tuning":
        made = [
            variant("prompt tuning", "prompt-tuning"),
            variant(f"LoRA, rank {config.lora_rank}", "lora", "lora", learning_rate=config.lora_rate),
            variant("full fine-tuning", "full", "full", learning_rate=config.full_rate),
        ]
    elif config.what == "tokens":
        made = [variant(f"{n} tokens", f"tokens-{n}", virtual_tokens=n) for n in dict.fromkeys(config.virtual_tokens)]
    elif config.what == "initial-text":
        initial = dict.fromkeys(config.initial_texts)
        made = [variant(_quoted(text), f"text-{_digest(text)}", initial_text=text) for text in initial]
    elif config.what == "placement":
        made = [variant(place, place, position=place) for place in ("front", "reply")]
    else:
        made = []
        for size in _sizes(config, len(rows)):
            file = Path(config.output) / f"rows-{size}" / "rows.jsonl"
            one = variant(f"{size} rows", file.parent.name, data=(str(file),))
            some = one.rows[: size + config.heldout]
            made.append(replace(one, rows=some, learned=size, own_file=True))
    return made, heldout


def _sizes(config: AblationConfig, rows: int) -> list[int]:
    """At most as many rows as there are, less those that a training holds out of its own file."""
    most = rows - config.heldout
    if most < 1:
        raise DataError(
            f"{', '.join(config.data)}: {rows} rows to train on, of which {config.heldout} more are held out",
            hint="more data, or fewer held-out rows",
        )
    return list(dict.fromkeys(min(size, most) for size in config.rows))


def _quoted(text: str) -> str:
    """On one line, and another for another text."""
    return json.dumps(text, ensure_ascii=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
