"""Retrieved nodes, judged before an LLM reads them. Knows nodes and `screen`; changes no stored node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.llms.detox_guard.events import DetoxScreeningEvent, dispatcher

import detox_guard

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_index.core.schema import BaseNode, RelatedNodeInfo

__all__ = ["MARK", "Action", "ScreenedNode", "screen_nodes"]

Action = Literal["drop", "mask", "mark"]
MARK = "detox_guard"
"""Metadata key of a flagged node: `{"score": …, "action": …}`. No LLM and no embedding model sees it."""


@dataclass(frozen=True)
class ScreenedNode:
    """One node as it was retrieved, as the LLM may read it (None: not at all), and as a reader may see it."""

    retrieved: NodeWithScore
    readable: NodeWithScore | None
    redacted: NodeWithScore
    score: float
    flagged: bool


def screen_nodes(
    nodes: Sequence[NodeWithScore], *, scorer: Any, threshold: float, action: Action
) -> list[ScreenedNode]:
    """Judge each node's text, and the metadata that an LLM would read with it; reports an event for each flagged one.

    drop: the LLM does not see the node. mask: toxic sentences are replaced, and toxic metadata that it would read is
    removed. mark: the LLM reads it as it is. Flagged nodes carry `MARK`. Metadata that no LLM reads flags no node; its
    toxic strings and keys, however deep, are replaced in what a reader sees, and in what is left by drop and mask.
    Raises `ScorerError`.
    """
    texts = [node.node.get_content(MetadataMode.NONE) for node in nodes]
    options: dict[str, Any] = {"scorer": scorer, "threshold": threshold, "action": "mask"}
    judged = detox_guard.screen(texts, **options)
    # Metadata is judged in front of the text that it belongs to: by themselves a few words say little.
    about = [" ".join(node.node.get_metadata_str(MetadataMode.LLM).split()) for node in nodes]
    together = [f"{words} {text.text}" if words else "" for words, text in zip(about, judged, strict=True)]
    described = detox_guard.screen(together, **options)
    hidden = [list(_unread(node.node)) for node in nodes]
    words_of = list(dict.fromkeys(text for metadata in hidden for text in _strings(metadata)))
    told = dict(zip(words_of, (one.text or "" for one in detox_guard.screen(words_of, **options)), strict=True))
    out = []
    for node, text, whole, unread in zip(nodes, judged, described, hidden, strict=True):
        score, flagged = max(text.score, whole.score), text.flagged or whole.flagged
        if not flagged:
            redacted = node
            if any(told[one] != one for one in _strings(unread)):
                redacted = NodeWithScore(node=node.node.model_copy(deep=True), score=node.score)
                _mask_unread(redacted.node, told)
            out.append(ScreenedNode(node, node if action == "mark" else redacted, redacted, score, flagged))
            continue
        dispatcher.event(DetoxScreeningEvent(node_id=node.node_id, score=score, action=action))
        mark = {"score": round(score, 4), "action": action}
        redacted = _copy(node, mark)
        _redact(redacted.node, text.text or "", whole.flagged, told)
        readable = {"drop": None, "mask": redacted, "mark": _copy(node, mark)}[action]
        out.append(ScreenedNode(node, readable, redacted, score, flagged))
    return out


def _copy(node: NodeWithScore, mark: dict[str, Any]) -> NodeWithScore:
    copy: BaseNode = node.node.model_copy(deep=True)
    copy.metadata = {**copy.metadata, MARK: mark}
    copy.excluded_llm_metadata_keys = [*copy.excluded_llm_metadata_keys, MARK]
    copy.excluded_embed_metadata_keys = [*copy.excluded_embed_metadata_keys, MARK]
    return NodeWithScore(node=copy, score=node.score)


def _redact(node: BaseNode, text: str, bare: bool, told: dict[str, str]) -> None:
    """Mask a copy: its text, and the metadata that no LLM reads, where a sentence window keeps the text again."""
    if text != node.get_content(MetadataMode.NONE):
        node.set_content(text)
    if bare:
        node.metadata = {MARK: node.metadata[MARK]}
    _mask_unread(node, told)


def _mask_unread(node: BaseNode, told: dict[str, str]) -> None:
    """`told`: what takes the place of each string."""

    def masked(value: Any) -> Any:
        return detox_guard.replace_strings(value, lambda text: told.get(text, text))

    renamed = {key: told.get(key, key) for key in node.excluded_llm_metadata_keys}
    node.metadata = {
        renamed.get(key, key): masked(value) if key in renamed else value for key, value in node.metadata.items()
    }
    node.excluded_llm_metadata_keys = list(renamed.values())
    node.excluded_embed_metadata_keys = [renamed.get(key, key) for key in node.excluded_embed_metadata_keys]
    for info in _related(node):
        info.metadata = masked(info.metadata)


def _unread(node: BaseNode) -> Iterator[dict[str, Any]]:
    """Metadata that no LLM reads: of the node, and what it keeps of its neighbours'."""
    hidden = {*node.excluded_llm_metadata_keys} - {MARK}
    yield {key: value for key, value in node.metadata.items() if key in hidden}
    for info in _related(node):
        yield info.metadata


def _related(node: BaseNode) -> Iterator[RelatedNodeInfo]:
    for related in node.relationships.values():
        yield from related if isinstance(related, list) else [related]


def _strings(value: object) -> Iterator[str]:
    """Every string in it, keys too."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _strings(part)
