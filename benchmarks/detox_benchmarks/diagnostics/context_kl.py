"""Does the soft prompt still pull behind a long context, and towards the toxic? KL(p_gen‖p_detox) along replies, and
the log-ratio between a toxic and a neutral text that say the same, in settings from no context to long passages.

Knows the streams' layouts ("front": [virtual][context][reply]; "reply": [context][virtual][reply]) as two plain passes
of transformers, without the engine; so it also checks the engine's own figures. The replies are given (teacher forced).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from detox_guard.errors import DataError, InvalidParamsError, PromptTooLongError
from detox_guard.evaluation.prompts import passage_of
from detox_guard.evaluation.tables import Sheet, rich_tables
from detox_guard.steering.forced import along, both_logits, generator_logits, make_batch, reply_logits
from detox_guard.text.prompts import encode_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from detox_guard.detoxifiers.card import Position
    from detox_guard.detoxifiers.soft_prompt import Detoxifier
    from detox_guard.detoxigen import DetoxiGen
    from detox_guard.models.backbone import Backbone

__all__ = ["ContextKL", "SettingKL", "context_kl", "forced_log_probs", "reply_contrast"]

INSTRUCTION = "Write a short comment for an online forum."
_ROWS = 16


@dataclass(frozen=True, slots=True)
class SettingKL:
    """One setting: mean context length in tokens, tokens measured, nats a token, and the share of the bare setting.

    Where there were pairs: `gap`, by how many nats more the detoxifier favours the toxic text of a pair than the
    neutral one (mean over pairs, log-ratios summed over tokens), and `aim`, the share of pairs where it is more.
    """

    setting: str
    context_tokens: float
    tokens: int
    kl: float
    of_bare: float
    gap: float | None = None
    aim: float | None = None


@dataclass(frozen=True)
class ContextKL:
    """What `context_kl` measured."""

    settings: tuple[SettingKL, ...]
    detoxifier_sha256: str
    position: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"context_kl": asdict(self)}, allow_nan=False)

    def table(self) -> RenderableType:
        """For a terminal."""
        title = f"KL(p_gen‖p_detox) along replies, detoxifier {self.detoxifier_sha256[:12]} ({self.position})"
        columns = ["context", "context tokens", "reply tokens", "nats a token", "of bare", "gap of pairs, nats", "aim"]
        rows = [
            [s.setting, f"{s.context_tokens:.0f}", str(s.tokens), f"{s.kl:.3f}", f"{s.of_bare:.2f}"]
            + ["–" if one is None else f"{one:.2f}" for one in (s.gap, s.aim)]
            for s in self.settings
        ]
        return rich_tables([Sheet(title, columns, rows)])


def context_kl(
    model: DetoxiGen,
    texts: Sequence[str],
    passages: Sequence[str],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    passage_tokens: Sequence[int] = (600, 2000),
    reply_tokens: int = 40,
    contexts: int = 4,
    decode: bool = False,
    seed: int = 0,
) -> ContextKL:
    """Mean KL(p_gen‖p_detox) a token along replies: bare, behind the chat template, and with passages behind it.

    The detoxifier is the model's first negative stream, as in a trace. `texts` are the replies, cut to `reply_tokens`;
    with `decode` they are prompts instead: the plain model continues them (temperature 1, top-p .9), with the prompt
    alone as the bare context, and as the user's turn elsewhere. `passages` are joined to `passage_tokens` tokens in
    `contexts` different ways, shared out over the replies. `pairs`, toxic and neutral, are given as replies in each
    setting. A reply's first token is not counted: without a context nothing predicts it, so each setting counts the
    same tokens.
    Raises `InvalidParamsError`, `DataError`, `PromptTooLongError`, and `PromptError` without a chat template.
    """
    backbone = model.backbone
    stream = next((s for s in model.streams if s.weight < 0), None)
    if stream is None:
        raise InvalidParamsError("model", "no negative stream", "one with a detoxifier")
    if not texts or not passages:
        raise DataError("no texts, or no passages, to measure with")
    virtual = stream.soft_prompt.embeddings.to(backbone.device, backbone.dtype)
    position = stream.soft_prompt.card.position

    settings: list[SettingKL] = []
    for name, wanted in [("bare", None), ("chat", 0), *((f"chat + {n}-token passage", n) for n in passage_tokens)]:
        turns = [passage_of(backbone, passages, wanted, way) for way in range(contexts)] if wanted else [""]
        kls: list[torch.Tensor] = []
        gaps: list[float] = []
        lengths: list[int] = []
        for way, turn in enumerate(turns):
            if some := list(pairs)[way :: len(turns)]:
                context = _given(backbone, turn, wanted is None)
                _check_room(backbone, len(context) + len(virtual) + reply_tokens)
                gaps += _gaps(backbone, virtual, position, context, some, reply_tokens)
            own = list(texts)[way :: len(turns)]
            for context, replies in _material(model, own, turn, wanted is None, decode, reply_tokens, seed):
                _check_room(backbone, len(context) + len(virtual) + reply_tokens)
                lengths += [len(context)] * len(replies)
                kls += [kl for kl, _ in reply_contrast(backbone, virtual, position, context, replies)]
        nats = torch.cat(kls) if kls else torch.empty(0)
        if not len(nats):
            raise DataError("no reply of at least two tokens to measure along")
        kl = float(nats.mean())
        bare = settings[0].kl if settings else kl
        share = kl / bare if bare else 0.0
        aims = (sum(gaps) / len(gaps), sum(gap > 0 for gap in gaps) / len(gaps)) if gaps else (None, None)
        settings.append(SettingKL(name, sum(lengths) / len(lengths), len(nats), kl, share, *aims))
    return ContextKL(tuple(settings), stream.detoxifier.sha256, position)


@torch.inference_mode()
def reply_contrast(
    backbone: Backbone,
    virtual: torch.Tensor,
    position: Position,
    context: Sequence[int],
    replies: Sequence[Sequence[int]],
    *,
    first: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """KL(p_gen‖p_detox) and log p_detox - log p_gen of the token itself, in nats at each reply token but the first,
    float32 `[reply_len - 1]` both, behind one context; with `first`, which a context is needed for, at that one too.

    `virtual` `[P, hidden]` are the virtual tokens. A reply of fewer than two tokens gives nothing (with `first`, an
    empty tensor if it is empty).
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    skipped = 0 if first else 1
    for at in range(0, len(replies), _ROWS):
        some = replies[at : at + _ROWS]
        if not any(some):
            found += [(torch.empty(0), torch.empty(0)) for _ in some if first]
            continue
        batch = make_batch([context], some, backbone.pad_token_id, backbone.device)
        ratio, kl, _ = along(*both_logits(backbone.model, virtual, batch, position), batch)
        cut = skipped if context else 0  # behind nothing, the first token has no figures anyway
        for row, reply in enumerate(some):
            if first or len(reply) > 1:
                own = slice(cut, len(reply) - skipped + cut)
                found.append((kl[row, own].cpu(), ratio[row, own].cpu()))
    return found


def _gaps(
    backbone: Backbone,
    virtual: torch.Tensor,
    position: Position,
    context: Sequence[int],
    pairs: Sequence[tuple[str, str]],
    reply_tokens: int,
) -> list[float]:
    """How much more each pair's toxic text is favoured than its neutral one, nats."""
    cut = [_cut(backbone, pair, reply_tokens) for pair in pairs]
    replies = [reply for both in cut if min(map(len, both)) > 1 for reply in both]
    sums = [float(ratio.sum()) for _, ratio in reply_contrast(backbone, virtual, position, context, replies)]
    return [toxic - neutral for toxic, neutral in zip(sums[::2], sums[1::2], strict=True)]


@torch.inference_mode()
def forced_log_probs(
    backbone: Backbone,
    detoxifier: Detoxifier | None,
    context: Sequence[int],
    reply: Sequence[int],
    *,
    first: bool = False,
) -> torch.Tensor:
    """Log-probabilities `[reply_len - 1, vocab]` in float32 of what follows each reply token but the last, in one
    stream: the generator's own, or behind a detoxifier's virtual tokens. With `first`, which a context is needed for,
    of what stands at the first as well."""
    batch = make_batch([context], [reply], backbone.pad_token_id, backbone.device)
    if detoxifier is None:
        logits = generator_logits(backbone.model, batch)
    else:
        virtual = detoxifier.embeddings.to(backbone.device, backbone.dtype)
        logits = reply_logits(backbone.model, virtual, batch, detoxifier.card.position)
    return logits[0, (0 if first else 1) - len(reply) :].float().log_softmax(-1)


def _material(
    model: DetoxiGen, texts: Sequence[str], passage: str, bare: bool, decode: bool, reply_tokens: int, seed: int
) -> list[tuple[list[int], list[list[int]]]]:
    """Pairs of a context and the replies to it, as ids."""
    backbone = model.backbone
    if not decode:
        return [(_given(backbone, passage, bare), _cut(backbone, texts, reply_tokens))] if texts else []
    prompts: list[Any] = [text if bare else _asked(passage, text) for text in texts]
    params = model.params.replace(
        alpha=0.0, plausibility=0.0, temperature=1.0, top_p=0.9, max_new_tokens=reply_tokens, seed=seed, trace=True
    )
    made = model.batch(prompts, params)
    return [
        (encode_prompt(backbone, prompt), [[token.token_id for token in one.trace.tokens]])
        for prompt, one in zip(prompts, made, strict=True)
        if one.trace
    ]


def _given(backbone: Backbone, passage: str, bare: bool) -> list[int]:
    """What stands before given replies."""
    return [] if bare else encode_prompt(backbone, _asked(passage, INSTRUCTION))


def _cut(backbone: Backbone, texts: Sequence[str], tokens: int) -> list[list[int]]:
    return [list(backbone.tokenizer(text, add_special_tokens=False)["input_ids"])[:tokens] for text in texts]


def _asked(passage: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{passage}\n\n{question}" if passage else question}]


def _check_room(backbone: Backbone, asked: int) -> None:
    bounds = [bound for bound in (backbone.max_positions, backbone.window) if bound is not None]
    if bounds and asked > min(bounds):
        raise PromptTooLongError("passage_tokens", asked, f"at most {min(bounds)} positions")
