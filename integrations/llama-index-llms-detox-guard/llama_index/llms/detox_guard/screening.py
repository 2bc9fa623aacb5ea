"""Retrieved nodes, judged before an LLM reads them. Knows nodes and `screen`; changes no stored node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.schema import MetadataMode, NodeWithScore
from llama_index.llms.detox_guard.events import DetoxScreeningEvent, dispatcher

import detox_guard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llama_index.core.schema import BaseNode

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

    drop: the LLM does not see the node. mask: toxic sentences are replaced, in metadata that no LLM reads too, and
    toxic metadata that it would read is removed. mark: the LLM reads it as it is. Flagged nodes carry `MARK`. Raises
    `ScorerError`.
    """
    texts = [node.node.get_content(MetadataMode.NONE) for node in nodes]
    options: dict[str, Any] = {"scorer": scorer, "threshold": threshold, "action": "mask"}
    judged = detox_guard.screen(texts, **options)
    # Metadata is judged in front of the text that it belongs to: by themselves a few words say little.
    about = [" ".join(node.node.get_metadata_str(MetadataMode.LLM).split()) for node in nodes]
    together = [f"{words} {text.text}" if words else "" for words, text in zip(about, judged, strict=True)]
    described = detox_guard.screen(together, **options)
    out = []
    for node, text, whole in zip(nodes, judged, described, strict=True):
        score, flagged = max(text.score, whole.score), text.flagged or whole.flagged
        if not flagged:
            out.append(ScreenedNode(node, node, node, score, flagged))
            continue
        dispatcher.event(DetoxScreeningEvent(node_id=node.node_id, score=score, action=action))
        mark = {"score": round(score, 4), "action": action}
        redacted = _copy(node, mark)
        _redact(redacted.node, text.text or "", whole.flagged, options)
        readable = {"drop": None, "mask": redacted, "mark": _copy(node, mark)}[action]
        out.append(ScreenedNode(node, readable, redacted, score, flagged))
    return out


def _copy(node: NodeWithScore, mark: dict[str, Any]) -> NodeWithScore:
    copy: BaseNode = node.node.model_copy(deep=True)
    copy.metadata = {**copy.metadata, MARK: mark}
    copy.excluded_llm_metadata_keys = [*copy.excluded_llm_metadata_keys, MARK]
    copy.excluded_embed_metadata_keys = [*copy.excluded_embed_metadata_keys, MARK]
    return NodeWithScore(node=copy, score=node.score)


def _redact(node: BaseNode, text: str, bare: bool, options: dict[str, Any]) -> None:
    """Mask a copy: its text, and the metadata that no LLM reads, where a sentence window keeps the text again."""
    if text != node.get_content(MetadataMode.NONE):
        node.set_content(text)
    kept = {MARK: node.metadata[MARK]} if bare else node.metadata
    node.metadata = _masked(kept, node.excluded_llm_metadata_keys, options)
    for related in node.relationships.values():
        for info in related if isinstance(related, list) else [related]:
            info.metadata = _masked(info.metadata, info.metadata, options)


def _masked(metadata: dict[str, Any], keys: Iterable[str], options: dict[str, Any]) -> dict[str, Any]:
    texts = {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}
    judged = detox_guard.screen(list(texts.values()), **options)
    return {**metadata, **{key: one.text for key, one in zip(texts, judged, strict=True)}}
