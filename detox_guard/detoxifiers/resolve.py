"""Whatever a user may pass as `detoxifier`, as streams that fit the model; and what "auto" comes to.

Knows the shipped detoxifier, the registry of those trained here, and the texts for a model that has none. Knows no
engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detox_guard.detoxifiers import registry
from detox_guard.detoxifiers.soft_prompt import Detoxifier, SteeringStream, last_part
from detox_guard.detoxifiers.text_view import TextView
from detox_guard.errors import DetoxifierError, InvalidParamsError

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

__all__ = ["AUTO", "UNTRAINED", "ManySteering", "Steering", "as_streams"]

AUTO = "auto"
Steering = str | Path | Detoxifier | TextView | SteeringStream
ManySteering = Steering | Sequence[Steering] | None
_SAME = "\n\nThe same again, but {}:\n\n"
_RUDE = _SAME.format("rude, insulting and hateful")
_KIND = _SAME.format("polite, friendly and respectful")
_TAIL, _WEIGHT = 48, 1.1
UNTRAINED = (
    Detoxifier.from_text(_RUDE, "reply", -_WEIGHT, tail=_TAIL),
    Detoxifier.from_text(_KIND, "reply", _WEIGHT, tail=_TAIL),
)
"""What serves a model that has no detoxifier. How they were chosen: benchmarks/results/texts.md."""
_log = logging.getLogger("detox_guard.detoxifiers")


def as_streams(detoxifier: ManySteering, backbone: Backbone) -> tuple[SteeringStream, ...]:
    """`detoxifier` as streams that were checked against `backbone`; `()` is none at all.

    "auto" (or None) is the shipped soft prompt for the embedded default model; else the one that was trained here for
    this very base; else texts, which need no training. What does not fit is then passed over, with a line in the log.
    Raises `DetoxifierError`, as `DetoxifierMismatchError`, for what was asked for and cannot serve.
    """
    if detoxifier is None or (isinstance(detoxifier, str) and detoxifier == AUTO):
        found = _auto(backbone)
        _log.info("%s is steered by %s", backbone.id, "; ".join(map(str, found)))
        return found
    many: list[Any] = list(detoxifier) if isinstance(detoxifier, list | tuple) else [detoxifier]
    kinds = (str, os.PathLike, Detoxifier, TextView, SteeringStream)
    if wrong := [one for one in many if not isinstance(one, kinds)]:
        bound = 'a name, a path, a Detoxifier, a text (Detoxifier.from_text), a SteeringStream, a list, or "auto"'
        raise InvalidParamsError("detoxifier", wrong[0], bound)
    if isinstance(detoxifier, list) and not many:
        raise DetoxifierError("an empty list of detoxifiers", hint="alpha=0 is the plain model")
    streams: list[SteeringStream] = []
    for one in many:
        if isinstance(one, str | os.PathLike):
            one = Detoxifier.load(one)
        stream = one if isinstance(one, SteeringStream) else SteeringStream(one)
        stream.detoxifier.validate(backbone)
        streams.append(stream)
    return tuple(streams)


def _auto(backbone: Backbone) -> tuple[SteeringStream, ...]:
    shipped = Detoxifier.load()
    names = map(last_part, (backbone.id, *backbone.also_called))
    if last_part(shipped.card.base_id) in names and _fits(shipped, backbone, "the shipped detoxifier"):
        return (SteeringStream(shipped, source="shipped"),)
    trained = _trained_here(backbone)
    if trained is not None:
        return (SteeringStream(trained, source="trained here"),)
    streams = tuple(replace(stream, source="untrained") for stream in UNTRAINED)
    for stream in streams:
        stream.detoxifier.validate(backbone)
    return streams


def _trained_here(backbone: Backbone) -> Detoxifier | None:
    folder = registry.find(backbone)
    if folder is None:
        return None
    try:
        detoxifier = Detoxifier.load(folder)
    except DetoxifierError as error:
        _log.warning("the detoxifier that was trained for %s is passed over: %s", backbone.id, error)
        return None
    return detoxifier if _fits(detoxifier, backbone, "the detoxifier that was trained here") else None


def _fits(detoxifier: Detoxifier, backbone: Backbone, what: str) -> bool:
    try:
        detoxifier.validate(backbone)
    except DetoxifierError as error:
        _log.warning("%s is passed over for %s: %s", what, backbone.id, error)
        return False
    return True
