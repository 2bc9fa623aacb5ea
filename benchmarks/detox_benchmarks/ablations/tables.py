"""An ablation's figures, as tables for a terminal and for docs, and as JSON. Knows figures; knows not how they came.

`summary["variants"][name]`: `trained_parameters`; `bytes` of "training" (weights, gradients, moments) and of "serving",
beside the backbone; `training_s`; `steps`, `batch_size`, `learning_rate`, `rows`, `passes` over them;
`heldout_loss_before` and `_after`, nats a reply token that any detoxifier can predict. `summary["runs"]`: one for each
temperature, top-p and `context`, `methods[name]` with `variant`, `alpha` and `figures` as in an eval's summary.
`context_kl[name]`: as `ContextKL`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard.evaluation.tables import Sheet, class_sheets, markdown, place_of, rich_tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

__all__ = ["ABLATION_FILE", "TABLE_FILE", "AblationReport"]

ABLATION_FILE, TABLE_FILE = "ablation.json", "table.md"
_PULL = (
    "Pull behind a context (in brackets: share of bare)",
    "KL(p_gen‖p_detox), nats a token",
    "{kl:.3f} ({of_bare:.2f})",
)
_AIM = (
    "Aim behind a context (in brackets: share of pairs whose toxic text gains)",
    "log-ratio, toxic less neutral text, nats a pair",
    "{gap:.2f} ({aim:.2f})",
)


@dataclass(frozen=True)
class AblationReport:
    """What `run_ablation` measured."""

    summary: dict[str, Any]

    def to_json(self, *, indent: int | None = None) -> str:
        """One line, unless indented."""
        return json.dumps({"ablation": self.summary}, ensure_ascii=False, allow_nan=False, indent=indent)

    def table(self) -> RenderableType:
        """For a terminal: what training took and gave, then decoding or the pull behind contexts."""
        return rich_tables(self._sheets(), self.foot())

    def markdown(self) -> str:
        """The same, to be pasted into docs."""
        return markdown(self._sheets(), self.foot())

    def foot(self) -> str:
        """Where and how all this was measured, in a line or two."""
        s = self.summary
        asked = s["settings"]
        words = f"{s['model']}, {s['dtype']}; seed {s['seed']}; {place_of(s)}. "
        if s["variants"]:
            steps, rows = (sorted({one[name] for one in s["variants"].values()}) for name in ("steps", "batch_size"))
            words += f"Trained for {steps[0]} steps of {rows[0]} texts; MB beside the backbone (training: weights, "
            words += "gradients, moments); loss: nats a held-out reply token. "
        if s["runs"]:
            words += f"{asked['samples']} samples of {asked['max_new_tokens']} tokens a prompt, rule {asked['rule']}; "
            words += "perplexity under the plain backbone. In brackets: 95 % bootstrap intervals over prompts; changes "
            words += "are to plain text of the same sampling, paired by prompt. "
        return words.strip()

    def _sheets(self) -> Iterator[Sheet]:
        s = self.summary
        if s["variants"]:
            passes = ["passes"] if s["ablation"] == "size" else []
            columns = ["variant", "trained", "training MB", "serving MB", "seconds", *passes, "loss before", "after"]
            yield Sheet("Training", columns, [_trained(name, one, bool(passes)) for name, one in s["variants"].items()])
        for run in s["runs"]:
            kind = "" if run["prompt_class"] == "all" else f"{run['prompt_class']} "
            title = f"{run['prompts']} {kind}prompts, temperature {run['temperature']:g}, top-p {run['top_p']:g}"
            title += f", {run['context']}" if s["ablation"] == "placement" else ""
            lines = [(name, method["figures"], None) for name, method in run["methods"].items()]
            yield from class_sheets(title, run["judges"], "backbone", lines)
        if s["context_kl"]:
            first = next(iter(s["context_kl"].values()))
            kinds = [_PULL] if first["settings"][0]["gap"] is None else [_PULL, _AIM]
            for title, figure, cell in kinds:
                columns = [figure, *(setting["setting"] for setting in first["settings"])]
                rows = [
                    [name, *(cell.format_map(setting) for setting in one["settings"])]
                    for name, one in s["context_kl"].items()
                ]
                yield Sheet(title, columns, rows)


def _trained(name: str, one: dict[str, Any], passes: bool) -> list[str]:
    seconds, cost = one["training_s"], [one["bytes"][kind] / 1e6 for kind in ("training", "serving")]
    return [
        name,
        f"{one['trained_parameters']:,}",
        *(f"{megabytes:,.0f}" if megabytes >= 100 else f"{megabytes:.2g}" for megabytes in cost),
        "–" if seconds is None else f"{seconds:.0f}",
        *([f"{one['passes']:.2f}"] if passes else []),
        *(f"{one[f'heldout_loss_{when}']:.3f}" for when in ("before", "after")),
    ]
