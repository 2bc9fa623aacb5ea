"""What passes between the engine and whoever submits requests. Plain data; knows no tensor layout."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from detox_guard.results import Finish
from detox_guard.steering.choose import TokenStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from detox_guard.settings import DecodingParams

__all__ = ["Ended", "Finish", "Request", "Rewind", "Sink", "TokenConstraint", "TokenStep"]


class Rewind(NamedTuple):
    """A sink's wish: take back the last `tokens` emitted tokens and decode on from there."""

    tokens: int


class Ended(NamedTuple):
    """A sink's verdict: the reply is over, for this reason."""

    reason: Finish


class Sink(Protocol):
    """Receives one request's tokens, on the engine's thread: be quick, do not block. An exception fails the request.

    Inside these calls, and only there, a sink may change its request's `params` (alpha, rule, sampling; not lengths)
    and `banned`: the next token is chosen by them.
    """

    def on_token(self, step: TokenStep) -> Ended | Rewind | None:
        """One token (which counts as emitted). None: go on."""

    def on_end(self, reason: Finish) -> Ended | Rewind | None:
        """The model is done. `Ended` closes the reply (also for another reason), a `Rewind` goes on decoding; None says
        not yet: the rows leave the batch, and the question is put again until it is answered."""

    def on_finish(self, reason: Finish) -> None:
        """The reply is complete."""

    def on_error(self, error: Exception) -> None:
        """The request failed or was cancelled; no other call follows."""


class TokenConstraint(Protocol):
    """What one reply may be. Stateful, so of one request alone; the engine's thread calls it."""

    def allowed(self) -> Tensor | None:
        """`[vocab]` bool on the CPU: what may come next, end tokens included; None = anything. Must not raise: all
        False fails the request."""

    def accept(self, token_id: int) -> bool:
        """A token was emitted. True if the reply is whole and nothing may follow. An exception fails the request."""

    def rollback(self, tokens: int) -> None:
        """The last `tokens` emitted tokens were taken back."""


@dataclass(eq=False)
class Request:
    """One reply to decode. `end_ids` are the ids that end it (they are not emitted); `seed` is already drawn.

    `steered`: stream rows are kept for it; needed where `params.alpha` is or may come to be above 0.
    """

    prompt_ids: list[int]
    params: DecodingParams
    seed: int
    end_ids: frozenset[int]
    sink: Sink
    keep_distributions: bool = False
    constraint: TokenConstraint | None = None
    steered: bool = False
    contexts: Sequence[Sequence[int]] = ()
    """What each view of place "system" reads in the place of the prompt, in the order of the views."""
    banned: frozenset[int] = frozenset()
    """Ids that the next token may not be, unless the constraint leaves no other."""
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        self.steered = self.steered or self.params.alpha > 0

    def cancel(self) -> None:
        """Ask the engine to drop this request; its seat is free within one step. Safe from any thread, any time."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()
