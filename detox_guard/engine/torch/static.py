"""One pass over the last tokens of all rows, for models of Llama's shape. Knows layers and slots; knows no requests.

transformers' forward of a decoding step spends a good part of its time beside the arithmetic. This one does the same
arithmetic with the model's own layers, so with whatever holds their weights, and with fewer operations: all that it
reads lies in tensors whose places do not change, the query heads that share a key are queries of one head, so are rows
that share a context, and queries and keys are rotated together.

A model is served if it is of a known family and nothing in it is unknown. What a family does otherwise is read from the
model. Whether the result is right is tried out: `static_step` gives nothing that does not compute what the model does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from detox_guard.engine.torch.feed import Feed, agree
from detox_guard.models.checks import windows_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence, Set

    from torch import Tensor

__all__ = ["StaticStep", "static_step"]

_log = logging.getLogger("detox_guard.engine")

_BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
_BEHIND = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_FAMILIES = {
    "llama": _BEFORE, "mistral": _BEFORE, "qwen2": _BEFORE, "qwen3": _BEFORE, "phi3": _BEFORE, "smollm3": _BEFORE,
    "granite": _BEFORE, "gemma": _BEFORE, "ministral": _BEFORE, "olmo2": _BEHIND, "olmo3": _BEHIND,
    "gemma3_text": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
"""transformers' types, and each layer's norms: before and behind the attention, before and behind the rest."""
_IDLE = {"resid_attn_dropout", "resid_mlp_dropout"}
"""Parts of a layer that do nothing in inference."""
_ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
_KEY_NORMS = {"q_norm", "k_norm"}
_MOVING_ROPES = {"dynamic", "longrope"}
"""Rotations that depend on how long the longest row is."""


_LONGEST = 16_384
"""The longest window that is tried out: it takes one token behind as many slots."""


class _Unknown(Exception):
    """Why a model is not served."""


@dataclass(frozen=True)
class _Layer:
    """What one layer computes with. The projections are one module (`qkv`) or three."""

    norms: tuple[Callable[[Tensor], Tensor] | None, ...]
    qkv: nn.Module | None
    projections: tuple[Any, ...]
    key_norms: tuple[tuple[Callable[[Tensor], Tensor], int], ...]
    """Of queries and of keys, and the width that each takes: a head's, or that of all heads."""
    out: nn.Module
    mlp: nn.Module
    scaling: float
    turn: str | None
    """How it is rotated: as layers of this kind are; "" where all are rotated alike, None where it is not."""
    window: int | None
    """How many tokens back it sees, itself among them; None: all."""


class StaticStep:
    """The model as a `feed.Step`. Raises what `_Unknown` names for a model it does not know.

    All methods expect `torch.inference_mode`.
    """

    even = False

    def __init__(self, model: Any) -> None:
        config, kind = model.config, model.config.model_type
        if kind not in _FAMILIES:
            raise _Unknown(f"{kind} is no family that is known")
        inner = model.base_model
        _whole(model, kind, {"model", "lm_head"})
        _whole(inner, kind, {"embed_tokens", "layers", "norm", "rotary_emb"})
        _whole(inner.rotary_emb, kind, set())
        ropes = inner.rotary_emb.rope_type
        if moving := _MOVING_ROPES.intersection(ropes.values() if isinstance(ropes, dict) else [ropes]):
            raise _Unknown(f"its positions are scaled by {moving.pop()}")
        if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
            raise _Unknown("it caps its scores")
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self._embed, self._rotary, self._head = inner.embed_tokens, inner.rotary_emb, model.lm_head
        self._norm = _norm(inner.norm, kind)
        self._scale = float(getattr(config, "embedding_multiplier", 1.0))
        self._share = float(getattr(config, "residual_multiplier", 1.0))
        self._divide = float(getattr(config, "logits_scaling", 1.0))
        layers = inner.layers[: config.num_hidden_layers]
        windows = [window for _, window in windows_of(config)] or [None] * len(layers)
        turns = config.layer_types if isinstance(ropes, dict) else [""] * len(layers)
        if not len(layers) == len(windows) == len(turns):
            raise _Unknown(f"{len(layers)} layers of {len(turns)} kinds")
        self.window = int(getattr(config, "sliding_window", None) or 0)
        """The window that the config names, whichever layers have it; 0: none."""
        if self.window > _LONGEST:
            raise _Unknown(f"a window of {self.window} tokens is too long to try out")
        self._layers = [self._layer(layer, kind, *how) for layer, *how in zip(layers, windows, turns, strict=True)]

    def _layer(self, layer: Any, kind: str, window: int | None, turn: str) -> _Layer:
        names = _FAMILIES[kind]
        _whole(layer, kind, {"self_attn", "mlp"} | {name for name in names if name}, _IDLE)
        attention = layer.self_attn
        parts = {name for name, _ in attention.named_children()}
        needed = next((some for some in _ATTENTION if some <= parts), None)
        if needed is None:
            raise _Unknown(f"its attention is made of {', '.join(sorted(parts))}")
        _whole(attention, kind, needed, _KEY_NORMS)
        if type(layer.mlp).__module__ != _module(kind):
            raise _Unknown(f"{type(layer.mlp).__name__} is none of its parts")
        norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if name in parts]
        return _Layer(
            norms=tuple(_norm(getattr(layer, name), kind) if name else None for name in names),
            qkv=attention.qkv_proj if "qkv_proj" in parts else None,
            projections=() if "qkv_proj" in parts else (attention.q_proj, attention.k_proj, attention.v_proj),
            key_norms=tuple((_norm(norm, kind), len(norm.weight)) for norm in norms),
            out=attention.o_proj,
            mlp=layer.mlp,
            scaling=float(attention.scaling),
            turn=turn if getattr(attention, "use_rope", True) else None,
            window=window,
        )

    def __call__(self, feed: Feed, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """As `feed.Step`. What a token does not see is not read, but must be finite."""
        (rows, count), (lanes, queries), width = feed.tokens.shape, feed.shape, feed.width
        shared = self.heads // self.kv_heads
        x = self._embed(feed.tokens)
        if self._scale != 1:
            x = x * self._scale
        turns = {turn: self._turn(x, feed.positions, turn) for turn in {layer.turn for layer in self._layers}}
        masks = {window: self._mask(feed, window, x.dtype) for window in {layer.window for layer in self._layers}}
        at = feed.lanes.unsqueeze(-1)
        for layer, k, v in zip(self._layers, keys, values, strict=True):
            before, behind, before_mlp, behind_mlp = layer.norms
            both, value = self._project(layer, x if before is None else before(x))
            if (turned := turns[layer.turn]) is not None:
                both = _rotated(both, *turned)
            query, key = both[:, :, : self.heads], both[:, :, self.heads :]
            k[at, :, feed.slots] = key
            v[at, :, feed.slots] = value
            query = feed.spread(query.flatten(0, 1)).view(lanes, queries, self.kv_heads, shared, self.head_dim)
            found = F.scaled_dot_product_attention(
                query.transpose(1, 2).reshape(lanes, self.kv_heads, queries * shared, self.head_dim),
                k[:lanes, :, :width],
                v[:lanes, :, :width],
                attn_mask=masks[layer.window],
                scale=layer.scaling,
            )
            found = found.reshape(lanes, self.kv_heads, queries, shared * self.head_dim).transpose(1, 2)
            found = feed.collect(found.reshape(lanes * queries, -1)).view(rows, count, -1)
            x = self._added(x, layer.out(found), behind)
            x = self._added(x, layer.mlp(x if before_mlp is None else before_mlp(x)), behind_mlp)
        logits = self._head(self._norm(x))
        if self._divide != 1:
            logits = logits / self._divide
        return logits.float()  # type: ignore[no-any-return]

    def _turn(self, x: Tensor, positions: Tensor, turn: str | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines `[rows, n, 1, dim]`, the first half of the sines negated."""
        if turn is None:
            return None
        cos, sin = (part.to(x.dtype).unsqueeze(2) for part in self._rotary(x, positions, *filter(None, [turn])))
        half = cos.shape[-1] // 2
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)

    def _mask(self, feed: Feed, window: int | None, dtype: torch.dtype) -> Tensor:
        """`[lanes, 1, queries of a key's head, slots]`, to be added: token by token, and of each token the heads that
        share a key."""
        (lanes, queries), shared = feed.shape, self.heads // self.kv_heads
        seen = feed.seen(window).flatten(0, 1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        mask = feed.spread(mask).unsqueeze(1).expand(-1, shared, -1)
        return mask.reshape(lanes, 1, queries * shared, feed.width)

    def _project(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[rows, n, heads + kv heads, head dim]`, values `[rows, n, kv heads, head dim]`."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        if layer.qkv is not None:
            all_three, edge = layer.qkv(x).view(shape), self.heads + self.kv_heads
            return all_three[..., :edge, :], all_three[..., edge:, :]
        parts = [project(x) for project in layer.projections]
        for i, (norm, width) in enumerate(layer.key_norms):
            parts[i] = norm(parts[i].view(*shape[:-2], -1, width)).flatten(-2)
        return torch.cat(parts[:2], -1).view(shape), parts[2].view(shape)

    def _added(self, x: Tensor, new: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        new = new if norm is None else norm(new)
        return x + (new if self._share == 1 else new * self._share)


def static_step(model: Any) -> StaticStep | None:
    """The step of this model; None for one that is not known, and, with a warning, where it computes something else.

    Expects `torch.inference_mode`. Runs one pass over a few tokens, and one of a token behind a window's slots.
    """
    try:
        step = StaticStep(model)
    except _Unknown as error:
        _log.debug("decoding by transformers' forward: %s", error)
        return None
    try:
        good = _as_the_model(step, model) and (not step.window or _sees_as_the_model(step, model))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        _log.warning("decoding by transformers' forward, which is slower: the short way failed: %s", error)
        return None
    if not good:
        _log.warning("decoding by transformers' forward, which is slower: the short way computes something else")
        return None
    return step


def _as_the_model(step: StaticStep, model: Any) -> bool:
    """Whether the last two tokens of three rows get the logits that whole passes give them. The last two rows share a
    context of four tokens, in the second lane; the first row is longer."""
    device, vocab = model.get_input_embeddings().weight.device, model.config.vocab_size
    ids = (torch.arange(24, device=device) * 37 + 5).view(3, 8) % vocab
    ids[2, :4] = ids[1, :4]
    cache = DynamicCache()
    exact = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    keys, values = ([getattr(layer, name)[:2].clone() for layer in cache.layers] for name in ("keys", "values"))
    for buffer in (*keys, *values):
        buffer[0, :, 6:] = 0
        buffer[1, :, 4:] = 0
    positions = torch.tensor([[6, 7], [4, 5], [4, 5]], device=device)
    # The rows that share a lane take turns behind its fourth slot.
    turns = [[*range(8)], [0, 1, 2, 3, 4, -1, 5, -1], [0, 1, 2, 3, -1, 4, -1, 5]]
    table = torch.tensor(turns, device=device)
    rows = torch.arange(3, device=device)
    feed = Feed(
        tokens=ids[rows.unsqueeze(-1), positions],
        positions=positions,
        slots=torch.tensor([[6, 7], [4, 6], [5, 7]], device=device),
        lanes=torch.tensor([0, 1, 1], device=device),
        lines=torch.tensor([0, 1, 4, 5, 6, 7], device=device),
        shape=(2, 4),
        width=8,
        table=table,
        rows=rows,
    )
    return agree(step(feed, keys, values), exact[rows.unsqueeze(-1), positions], model.dtype)


def _sees_as_the_model(step: StaticStep, model: Any) -> bool:
    """Whether a token behind one window and a bit sees as far as the model's own mask lets it.

    What it sees there is made up: nothing, but for the values on both sides of the window's edge.
    """
    device, slots = model.get_input_embeddings().weight.device, step.window + 2

    def made_up() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(model.config.num_hidden_layers):
            values = torch.zeros(1, step.kv_heads, slots, step.head_dim, dtype=model.dtype, device=device)
            edge = torch.linspace(-1, 1, 3 * step.head_dim, device=device).roll(7 * i).view(3, -1)
            values[:, :, 1:4] = edge * step.window
            yield torch.zeros_like(values), values

    cache = DynamicCache(made_up())
    tokens, at = torch.tensor([[5]], device=device), torch.tensor([[slots]], device=device)
    exact = model(input_ids=tokens, position_ids=at, past_key_values=cache, use_cache=True).logits
    k, v = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
    row = torch.zeros(1, dtype=torch.long, device=device)
    table = torch.arange(slots + 1, device=device).unsqueeze(0)
    feed = Feed(tokens, at, at, row, None, (1, 1), slots + 1, table, row)
    return agree(step(feed, k, v), exact, model.dtype)


def _module(kind: str) -> str:
    family = kind.removesuffix("_text")
    return f"transformers.models.{family}.modeling_{family}"


def _whole(module: Any, kind: str, parts: Set[str], maybe: Set[str] = frozenset()) -> None:
    """Raise unless this is transformers' own class of that family, with these parts, and does what it always does."""
    name = type(module).__name__
    if type(module).__module__ != _module(kind):
        raise _Unknown(f"{name} is none of its parts")
    found = {child for child, _ in module.named_children()}
    if not parts <= found <= parts | maybe:
        raise _Unknown(f"{name} is made of {', '.join(sorted(found))}")
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        raise _Unknown(f"somebody listens to {name}, or has changed it")


def _norm(module: Any, kind: str) -> Callable[[Tensor], Tensor]:
    _whole(module, kind, set())
    if not hasattr(module, "variance_epsilon"):
        return module  # type: ignore[no-any-return]  # Gemma's, which adds 1 to its weight in float32
    weight, epsilon = module.weight.detach(), module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[rows, n, heads, dim]`, rotated. The first half of `sin` is negated. Dims past its width stay."""
    width = cos.shape[-1]
    part = x if width == x.shape[-1] else x[..., :width]
    turned = torch.addcmul(part * cos, part.roll(width // 2, -1), sin)
    return turned if part is x else torch.cat((turned, x[..., width:]), -1)
