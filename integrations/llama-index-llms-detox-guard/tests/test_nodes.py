"""Screening of nodes, the postprocessor and the evaluator."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from llama_index.core import Document
from llama_index.core.evaluation import BatchEvalRunner
from llama_index.core.node_parser import SentenceWindowNodeParser
from llama_index.core.schema import (
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
    DetoxNodePostprocessor,
    ToxicityEvaluator,
    get_detox_response_synthesizer,
)
from llama_index.llms.detox_guard.screening import Action, screen_nodes
from llama_index_harness import nodes, recorded_events, scripted

from detox_guard import SCREEN_NOTE, GuardPolicy, InvalidParamsError, ScorerError
from detox_guard.testing import ScriptedScorer

if TYPE_CHECKING:
    from collections.abc import Sequence

TEXTS = ["The library opens at nine.", "It closes at six. What a stupid building.", "Entry is free."]


class BrokenScorer:
    name = "broken"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [float("nan")] * len(texts)


def postprocessor(action: Any = "mask", **options: Any) -> DetoxNodePostprocessor:
    return DetoxNodePostprocessor(action=action, scorer=ScriptedScorer("stupid"), **options)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("action", "kept", "rude"), [("drop", 2, False), ("mask", 3, False), ("mark", 3, True)])
async def test_actions(action: str, kept: int, rude: bool, is_async: bool) -> None:
    given = nodes(*TEXTS)
    if is_async:
        out = await postprocessor(action).apostprocess_nodes(given, QueryBundle("q"))
    else:
        out = postprocessor(action).postprocess_nodes(given, query_str="q")
    texts = [node.node.get_content(MetadataMode.LLM) for node in out]
    assert len(texts) == kept
    assert any("stupid" in text for text in texts) is rude
    assert texts[0] == TEXTS[0]
    assert texts[-1] == TEXTS[-1]
    if kept == 3:
        assert "It closes at six." in texts[1]
        assert out[1].node.metadata == {"detox_guard": {"score": 0.9, "action": action}}
        assert "0.9" not in texts[1]  # the mark is nothing that an LLM reads
    assert [node.node.get_content() for node in given] == TEXTS
    assert out[0] is given[0]


def test_scores_ids_and_order_survive() -> None:
    out = postprocessor().postprocess_nodes(nodes(*TEXTS))
    assert [(node.node_id, node.score) for node in out] == [("n0", 1.0), ("n1", 1.0), ("n2", 1.0)]


def test_each_flagged_node_is_an_event_without_its_text() -> None:
    with recorded_events() as events:
        postprocessor("drop").postprocess_nodes(nodes(*TEXTS))
    (event,) = events.named("DetoxScreeningEvent")
    assert (event.node_id, event.score, event.action) == ("n1", 0.9, "drop")
    assert "stupid" not in event.model_dump_json()


def test_metadata_that_the_llm_would_read_is_screened() -> None:
    node = TextNode(text="Entry is free.", metadata={"title": "A stupid library", "page": 3})
    (out,) = postprocessor().postprocess_nodes([NodeWithScore(node=node)])
    assert "stupid" not in out.node.get_content(MetadataMode.LLM)
    assert "Entry is free." in out.node.get_content(MetadataMode.LLM)


def hiding(text: str, metadata: dict[str, Any]) -> NodeWithScore:
    """A node whose metadata no LLM reads, and which knows a neighbour's."""
    near = RelatedNodeInfo(node_id="near", metadata={"said": ["stupid"]})
    keys = list(metadata)
    node = TextNode(text=text, metadata=metadata, excluded_llm_metadata_keys=keys, excluded_embed_metadata_keys=keys)
    node.relationships[NodeRelationship.NEXT] = near
    return NodeWithScore(node=node, score=0.5)


HIDDEN: dict[str, Any] = {
    "note": "stupid",
    "notes": ["Entry is free.", {"by": "A stupid one", "stupid": ("stupid", 3)}],
    "How stupid": 1,
    "page": 3,
}


@pytest.mark.parametrize("text", ["Entry is free.", "How stupid. Entry is free."])
@pytest.mark.parametrize("action", ["drop", "mask", "mark"])
def test_metadata_that_no_llm_reads_is_masked_however_deep(action: Action, text: str) -> None:
    node = hiding(text, HIDDEN)
    stored = node.model_copy(deep=True)
    (screened,) = screen_nodes([node], scorer=ScriptedScorer("stupid"), threshold=0.5, action=action)
    redacted = screened.redacted.node
    assert "stupid" not in redacted.model_dump_json()
    assert redacted.metadata["page"] == 3
    assert redacted.metadata["notes"][0] == "Entry is free."
    assert redacted.metadata["notes"][1]["by"] == SCREEN_NOTE
    assert "removed" not in redacted.get_metadata_str(MetadataMode.LLM)  # a masked key stays hidden
    assert "removed" not in redacted.get_metadata_str(MetadataMode.EMBED)
    assert node == stored
    assert screened.flagged is ("stupid" in text)
    assert screened.score == (0.9 if screened.flagged else 0.1)  # no LLM reads it: it flags no node
    if not screened.flagged:
        assert screened.readable is not None
        assert screened.readable.node.get_content(MetadataMode.LLM) == node.node.get_content(MetadataMode.LLM)
        assert ("stupid" in screened.readable.node.model_dump_json()) is (action == "mark")


def test_clean_hidden_metadata_leaves_the_node_itself() -> None:
    node = NodeWithScore(node=TextNode(text="Free.", metadata={"by": ["Ann"]}, excluded_llm_metadata_keys=["by"]))
    (screened,) = screen_nodes([node], scorer=ScriptedScorer("stupid"), threshold=0.5, action="mask")
    assert screened.readable is screened.redacted is node


def test_sources_and_their_metadata_in_a_response_hide_what_no_llm_read() -> None:
    given = hiding("Entry is free.", HIDDEN)
    response = get_detox_response_synthesizer(
        DetoxiGenLLM(detoxigen=scripted()), policy=GuardPolicy(scorer=ScriptedScorer("stupid"))
    ).synthesize("When?", [given])
    assert "stupid" not in response.source_nodes[0].model_dump_json()
    assert "stupid" not in json.dumps(response.metadata)
    assert response.metadata is not None
    assert response.metadata["detox"]["screened"] == []


@pytest.mark.parametrize("action", ["drop", "mask", "mark"])
def test_sentence_windows_are_redacted_with_their_text(action: Action) -> None:
    document = Document(text="Entry is free. How stupid. It closes at six.", metadata={"file": "hours.txt"})
    node = SentenceWindowNodeParser.from_defaults().get_nodes_from_documents([document])[1]
    stored = node.model_copy(deep=True)
    (screened,) = screen_nodes(
        [NodeWithScore(node=node)], scorer=ScriptedScorer("stupid"), threshold=0.5, action=action
    )
    redacted = screened.redacted.node
    assert "stupid" not in redacted.model_dump_json()
    assert redacted.metadata["window"].startswith("Entry is free.")
    assert redacted.metadata["window"].endswith("It closes at six.")
    assert redacted.metadata["file"] == "hours.txt"
    assert node == stored
    if action == "mark":
        assert screened.readable is not None
        assert {**screened.readable.node.metadata, "detox_guard": None} == {**stored.metadata, "detox_guard": None}


def test_nothing_retrieved_is_nothing_screened() -> None:
    assert postprocessor().postprocess_nodes([]) == []


def test_a_threshold_and_the_embedded_scorer() -> None:
    assert len(postprocessor("drop", threshold=0.95).postprocess_nodes(nodes(*TEXTS))) == 3
    rude = "You are a stupid idiot and everybody hates you."
    kept = DetoxNodePostprocessor(action="drop").postprocess_nodes(nodes(TEXTS[0], rude))
    assert [node.node_id for node in kept] == ["n0"]


def test_a_scorer_that_cannot_judge_lets_nothing_through() -> None:
    with pytest.raises(ScorerError):
        DetoxNodePostprocessor(scorer=BrokenScorer()).postprocess_nodes(nodes("a"))


def test_round_trip_of_the_postprocessor() -> None:
    one = DetoxNodePostprocessor(action="drop", threshold=0.25)
    again = DetoxNodePostprocessor.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again.to_dict() == one.to_dict()
    with pytest.raises(ValueError, match="threshold"):
        DetoxNodePostprocessor(threshold=1.5)


# -- evaluator


@pytest.mark.parametrize(("text", "passing"), [("Entry is free.", True), ("How stupid.", False)])
async def test_evaluator(text: str, passing: bool) -> None:
    result = await ToxicityEvaluator(ScriptedScorer("stupid")).aevaluate(query="q", response=text, contexts=["c"])
    assert (result.passing, result.score) == (passing, 0.1 if passing else 0.9)
    assert (result.query, result.response, result.contexts) == ("q", text, ["c"])
    assert result.feedback


@pytest.mark.filterwarnings("ignore:asyncio_module:DeprecationWarning")  # the runner's own
def test_evaluator_in_the_batch_runner() -> None:
    runner = BatchEvalRunner({"toxicity": ToxicityEvaluator(ScriptedScorer("stupid"))}, workers=2)
    results = runner.evaluate_response_strs(queries=["a", "b"], response_strs=["Entry is free.", "How stupid."])
    assert [result.passing for result in results["toxicity"]] == [True, False]


async def test_evaluator_needs_a_response_and_a_scorer_that_works() -> None:
    with pytest.raises(ValueError, match="response"):
        await ToxicityEvaluator(ScriptedScorer("stupid")).aevaluate(query="q")
    with pytest.raises(ScorerError):
        await ToxicityEvaluator(BrokenScorer()).aevaluate(response="a")


@pytest.mark.parametrize("kind", [DetoxNodePostprocessor, ToxicityEvaluator])
@pytest.mark.parametrize(
    ("name", "value"), [("nope", 1), ("scorer", 5), ("threshold", True), ("threshold", "x"), ("threshold", 1.5)]
)
def test_a_bad_option_is_an_error_that_names_it(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(InvalidParamsError) as raised:
        kind(**{name: value})
    assert raised.value.field == name


def test_defaults_and_descriptions_are_the_cores() -> None:
    for name in ("threshold", "scorer"):
        core, ours = GuardPolicy.model_fields[name], DetoxNodePostprocessor.model_fields[name]
        assert ours.default == core.default
    assert DetoxNodePostprocessor.model_fields["scorer"].description == GuardPolicy.model_fields["scorer"].description
    assert DetoxiGenLLM(detoxigen=scripted()).decoding == {}  # it keeps only what was set
