"""One model of a configuration, loaded and tried. Knows `DetoxiGen`; knows no request.

Fail closed: what comes out of here has its detoxifier, decoded a token with it, and its guard's scorer gave a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard.detoxigen import DetoxiGen
from detox_guard.errors import DetoxifierNotFoundError
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from detox_guard.server.config import ModelConfig
    from detox_guard.settings import GuardPolicy

__all__ = ["load_model", "params_of"]


def load_model(one: ModelConfig, guard: GuardPolicy | None = None) -> DetoxiGen:
    """The model of a configuration without `upstream`. `guard` is what replies stand under where the model's own params
    have none.

    Raises `BackboneError`, `DetoxifierError`, `ScorerError`, `EngineError`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # nobody watches a server
    plain, params = _is_plain(one), params_of(one)
    auto = one.detoxifier is None or one.detoxifier == ("auto",)
    model = DetoxiGen.from_pretrained(
        one.model,
        detoxifier=() if plain else "auto" if auto else list(one.detoxifier or ()),
        params=params,
        config=one.engine,
        **one.loading,
    )
    try:
        if not plain and not model.detoxifier_ids:
            raise DetoxifierNotFoundError(
                f"no detoxifier for {model.model_id!r}", hint="`detoxifier = []` serves the plain model"
            )
        _try(model, guard if params.guard is None else params.guard)
    except BaseException:
        model.close()
        raise
    return model


def params_of(one: ModelConfig) -> DecodingParams:
    """Defaults of a model's requests: a model without a detoxifier is not steered."""
    params = DecodingParams() if one.params is None else one.params
    return params.replace(alpha=0.0) if _is_plain(one) and "alpha" not in params.model_fields_set else params


def _is_plain(one: ModelConfig) -> bool:
    return one.detoxifier == () or (one.detoxifier is None and one.params is not None and one.params.alpha == 0)


def _try(model: DetoxiGen, guard: GuardPolicy | None) -> None:
    """One token, as a request would be decoded, that nobody is shown."""
    if guard is not None:
        guard = guard.replace(audit_log=None, on_exhausted="replace", scan_input=False)
    model.generate("Hello", max_new_tokens=1, seed=0, guard=guard)
