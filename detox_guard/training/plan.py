"""How much `adapt` does in each phase, and how long that takes. Knows counts and costs; does nothing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FEWEST_STEPS", "FULL_STEPS", "Plan"]

FULL_STEPS, FEWEST_STEPS = 240, 20
"""Steps of both tunings in a plan by the clock, at most and at least."""
PROMPTS, MEASURED = 300, 40
"""Prompts that are answered, and held-out ones of each class, in a full plan."""
COSTS = {"first": 0.25, "pairs": 0.2, "second": 1.0, "measure": 0.6}
"""A step, or all that is done with a prompt, in steps of the second tuning. Measured: embedded model, CPU, float32."""


@dataclass(frozen=True)
class Plan:
    """How much is done in each phase. Made once a run, so that one that is taken up does what it would have done."""

    first: int
    prompts: int
    second: int
    measured: int
    step_s: float | None = None

    @classmethod
    def of(cls, steps: int, step_s: float | None = None) -> Plan:
        """For so many steps of both tunings, the rest in proportion. `step_s`: seconds of one, None if not known."""
        share, first = min(1.0, steps / FULL_STEPS), max(1, steps // 4)
        return cls(first, max(4, round(PROMPTS * share)), steps - first, max(4, round(MEASURED * share)), step_s)

    def minutes_from(self, phase: str) -> float | None:
        """How long this phase and those after it take."""
        if self.step_s is None:
            return None
        names, counts = list(COSTS), (self.first, self.prompts, self.second, self.measured)
        left = list(zip(COSTS.values(), counts, strict=True))[names.index(phase) :]
        return self.step_s * sum(cost * count for cost, count in left) / 60
