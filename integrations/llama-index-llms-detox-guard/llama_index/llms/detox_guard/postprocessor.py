"""`DetoxNodePostprocessor`: screening for any retriever or query engine. Knows nodes; knows no LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llama_index.core.bridge.pydantic import Field, field_serializer, field_validator
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.llms.detox_guard.portable import Portable, as_json
from llama_index.llms.detox_guard.screening import Action, screen_nodes

from detox_guard import GuardPolicy, InvalidParamsError, field_of

if TYPE_CHECKING:
    from llama_index.core.schema import NodeWithScore, QueryBundle

__all__ = ["DetoxNodePostprocessor"]


class DetoxNodePostprocessor(Portable, BaseNodePostprocessor):
    """Drops, masks or marks toxic nodes between the retriever and the LLM. Raises `ScorerError`: it fails closed;
    and `InvalidParamsError` for an unknown or bad option.

    Stored nodes are never changed; flagged nodes are copies that carry `metadata["detox_guard"]`. A scorer object is
    shared by copies; pickling it, or a dict that says its name, raises `NotPicklableError`.
    """

    own: ClassVar[tuple[str, ...]] = ("scorer",)

    action: Action = Field(default="mask", description="What happens to a toxic node.")
    threshold: float = field_of(GuardPolicy, "threshold", ge=0, le=1, description="A text with more is flagged.")
    scorer: Any = field_of(GuardPolicy, "scorer")

    @field_validator("threshold", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a number from 0 to 1")
        return value

    @field_validator("scorer")
    @classmethod
    def _is_a_scorer(cls, value: Any) -> Any:
        try:
            return GuardPolicy(scorer=value).scorer
        except InvalidParamsError:
            raise ValueError("a scorer's name, or an object with .name and .score()") from None

    @field_serializer("scorer")
    def _scorer_as_json(self, scorer: Any) -> Any:
        return as_json(scorer)

    @classmethod
    def class_name(cls) -> str:
        return "DetoxNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        screened = screen_nodes(nodes, scorer=self.scorer, threshold=self.threshold, action=self.action)
        return [node.readable for node in screened if node.readable is not None]
