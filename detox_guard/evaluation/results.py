"""The figures of an evaluation, as a table and as one JSON line. Knows figures; knows not how they came about."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from detox_guard.evaluation.metrics import Interval, Toxicity

__all__ = ["EvalReport", "GroupFigures", "SystemFigures"]


@dataclass(frozen=True)
class SystemFigures:
    """One system on one group of prompts. None is "does not apply" (plain text) or "not defined".

    `perplexity` is of the continuations given their prompts, under the plain backbone at temperature 1, weighted by
    token; its ratio is to plain text. `distinct`: 1-, 2-, 3-grams. Divergences: nats a token. `empty_rate`: share of
    replies without a visible character, which judges find harmless. `tokens_per_s`: of the system's whole run, all
    groups and streams together.
    """

    system: str
    alpha: float
    rule: str | None
    plausibility: float
    toxicity: dict[str, Toxicity]
    perplexity: Interval
    perplexity_ratio: Interval | None
    distinct: tuple[float | None, ...]
    reply_tokens: float
    empty_rate: float
    fallback_rate: float | None
    kl_detoxifier: float | None
    kl_steering: float | None
    tokens_per_s: float


@dataclass(frozen=True)
class GroupFigures:
    """All systems on the prompts of one group: "toxic", "non-toxic", or "all" where the file has no labels."""

    group: str
    prompts: int
    systems: tuple[SystemFigures, ...]


@dataclass(frozen=True)
class EvalReport:
    """What `run_eval` measured. `context`: model, detoxifiers, judges, seeds, machine, versions."""

    groups: tuple[GroupFigures, ...]
    context: dict[str, Any]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(
            {"eval": {"groups": [asdict(group) for group in self.groups], **self.context}}, allow_nan=False
        )

    def table(self) -> RenderableType:
        """A rich renderable: toxicity and text quality for each group of prompts. Brackets are 95 % intervals."""
        from rich.console import Group

        return Group(*(part for group in self.groups for part in self._tables(group)), self._foot())

    def _tables(self, group: GroupFigures) -> list[RenderableType]:
        from rich.table import Table

        harm = Table(
            title=f"{group.prompts} {group.group} prompts: toxicity of the continuations", title_justify="left"
        )
        for column in ("judge", "system", "expected max", "reduction", "P(any ≥ .5)", "reduction", "mean"):
            harm.add_column(column, justify="left" if column in ("judge", "system") else "right")
        for judge in self.context["judges"]:
            for system in group.systems:
                t = system.toxicity[judge]
                harm.add_row(
                    judge,
                    system.system,
                    _interval(t.expected_max),
                    _interval(t.expected_max_reduction, percent=True),
                    _interval(t.probability),
                    _interval(t.probability_reduction, percent=True),
                    _interval(t.mean),
                )
            harm.add_section()
        text = Table(title=f"{group.prompts} {group.group} prompts: text", title_justify="left")
        text.add_column("system")
        for column in (
            "perplexity", "/ plain", "dist-1/2/3", "tokens", "empty", "fallbacks",
            "KL(gen‖detox)", "KL(p‖gen)", "tokens/s",
        ):  # fmt: skip
            text.add_column(column, justify="right")
        for system in group.systems:
            text.add_row(
                system.system,
                _interval(system.perplexity, digits=1),
                _interval(system.perplexity_ratio),
                " ".join(_number(value) for value in system.distinct),
                _number(system.reply_tokens, 1),
                f"{system.empty_rate:.1%}",
                "–" if system.fallback_rate is None else f"{system.fallback_rate:.2%}",
                _number(system.kl_detoxifier),
                _number(system.kl_steering),
                _number(system.tokens_per_s, 0),
            )
        return [harm, text]

    def _foot(self) -> str:
        c = self.context
        place = c["machine"].get("gpu") or f"{c['machine']['cpu']}, {c['machine']['cores']} cores"
        steering = ", ".join(f"{d['sha256'][:12]} ({d['position']})" for d in c["detoxifiers"]) or "none"
        return (
            f"{c['model']}, {c['dtype']}; detoxifier {steering}; {c['samples']} samples a prompt, seed {c['seed']}; "
            f"{place}; {c['wall_s']:.0f} s. In brackets: 95 % bootstrap intervals over prompts."
        )


def _interval(interval: Interval | None, *, percent: bool = False, digits: int = 3) -> str:
    if interval is None or interval.value is None:
        return "–"

    def shown(number: float | None) -> str:
        return "–" if number is None else f"{number:.0%}" if percent else f"{number:.{digits}f}"

    # Rich reads square brackets as markup.
    return f"{shown(interval.value)} ({shown(interval.low)}, {shown(interval.high)})"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
