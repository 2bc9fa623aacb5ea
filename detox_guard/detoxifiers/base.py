"""What a view is: the tokens that one row reads besides its request's context, and where they stand.

Knows ids and virtual tokens; knows no model, no cache, no text. A row of each place reads, before the reply::

    front     [view][context]              the view is computed once; the context once more, behind it
    reply     [context][view][tail]        the context's keys and values are the generator's own
    system    [another context]            nothing is shared: the whole of it is computed once more

`tail` is the end of the context said again, so that a text between context and reply does not cut the sentence that
the reply goes on with. A soft prompt has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["EmbeddingPrefix", "Place", "TokenPrefix", "View", "ids_behind", "lanes_of", "most_beside", "own_contexts"]

Place = Literal["front", "reply", "system"]


@dataclass(frozen=True, eq=False)
class EmbeddingPrefix:
    """Virtual tokens: a soft prompt. For models and runners that take input embeddings."""

    embeddings: Tensor
    """`[P, hidden]`."""
    weight: float = -1.0
    """Signed: negative pushes away from the view (a detoxifier), positive pulls towards it (an expert)."""
    place: Literal["front", "reply"] = "reply"

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclass(frozen=True)
class TokenPrefix:
    """Tokens of the model's own vocabulary: a text. For any model and any runner."""

    ids: tuple[int, ...]
    """Those of place "system" stand in a context of its own, which comes with each request."""
    weight: float = -1.0
    """As `EmbeddingPrefix.weight`."""
    place: Place = "front"
    tail: int = 0
    """Place "reply" only: so many of the context's last tokens follow the view once more, or as many as there are."""

    def __len__(self) -> int:
        return len(self.ids)


View = EmbeddingPrefix | TokenPrefix


def ids_behind(view: TokenPrefix, context: Sequence[int]) -> tuple[int, ...]:
    """What a row of place "reply" reads between the context and the reply."""
    return (*view.ids, *context[max(0, len(context) - view.tail) :])


def own_contexts(views: Sequence[View], contexts: Sequence[Sequence[int]]) -> dict[int, Sequence[int]]:
    """Which view reads which context of a request's own: by the view's place in `views`.

    `contexts`: one for each view of place "system", in their order. Raises `ValueError` for more or fewer.
    """
    own = [index for index, view in enumerate(views) if view.place == "system"]
    return dict(zip(own, contexts, strict=True))


def most_beside(views: Sequence[View]) -> int:
    """The most slots that a row holds besides the request's context; one with a context of its own holds none."""
    return max((len(view) + getattr(view, "tail", 0) for view in views if view.place != "system"), default=0)


def lanes_of(views: Sequence[View], context: int, contexts: Sequence[int], new: int) -> list[int]:
    """The slots of each stretch of memory that a request takes, at the most.

    The generator and the `reply` views share one, which holds the context once; unless the reply may become longer than
    the context: then each has its own, as each other view has. `context`, `contexts`: the tokens of the request's
    context, and of the own ones of its `system` views. `new`: the tokens of its reply, at the most.
    """
    behind = [len(view) + min(getattr(view, "tail", 0), context) for view in views if view.place == "reply"]
    others = [len(view) + context + new for view in views if view.place == "front"]
    others += [own + new for own in contexts]
    if context < new:
        return [context + new, *(context + own + new for own in behind), *others]
    return [context + sum(behind) + new * (1 + len(behind)), *others]
