"""Grammars: what is finished is valid, neighbours notice nothing, rewinding works, and what cannot be is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch
from harness import Recorder, random_prompts, random_streams, request, torch_engine
from pydantic import BaseModel
from tiny import make_tiny_backbone

from detox_guard import DecodingParams, DetoxiGen, Grammar, GuardPolicy, InvalidParamsError, RequestCancelledError
from detox_guard.engine import Go, Rewind
from detox_guard.text.llguidance import compile_grammar
from detox_guard.text.tools import tool_format

if TYPE_CHECKING:
    from detox_guard.models.backbone import Backbone

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
}
TREE = {"$ref": "#/$defs/Node", "$defs": {"Node": {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
    "required": ["value"],
}}}  # fmt: skip
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "nested": {"type": "object", "required": ["a"],
               "properties": {"a": {"type": "object", "properties": {"b": PERSON}, "required": ["b"]}}},
    "optional": {"type": "object", "properties": {k: {"type": "boolean"} for k in "abcd"}, "required": ["c"]},
    "none required": {"type": "object", "properties": {k: {"type": "number"} for k in "xyz"}},
    "no properties": {"type": "object", "properties": {}},
    "any object": {"type": "object"},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "enum": {"enum": ["red", "green", "blue", 7, None, True]},
    "const": {"type": "object", "required": ["kind", "n"],
              "properties": {"kind": {"const": "x"}, "n": {"type": "null"}}},
    "strings": {"type": "array", "items": {"type": "string"}},
    "bounded list": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    "list of objects": {"type": "array", "items": PERSON, "minItems": 1},
    "tuple": {"type": "array", "minItems": 2, "items": False, "prefixItems": [{"type": "integer"}, {"type": "string"}]},
    "union of types": {"type": ["string", "integer", "null"]},
    "union of objects": {"anyOf": [
        PERSON, {"type": "object", "properties": {"x": {"enum": ["l", "r"]}}, "required": ["x"]}
    ]},
    "discriminated": {"oneOf": [
        {"type": "object", "properties": {"kind": {"const": k}, k: {"type": "integer"}}, "required": ["kind", k]}
        for k in ("cat", "dog")
    ]},
    "recursive": TREE,
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "object", "properties": {"on": {"type": "string", "format": "date"}}, "required": ["on"]},
    "numbers": {"type": "object", "properties": {"i": {"type": "integer", "minimum": -3, "maximum": 3},
                                                 "f": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}},
                "required": ["i", "f"]},
    "long strings": {"type": "object", "properties": {"s": {"type": "string", "minLength": 5, "maxLength": 9}},
                     "required": ["s"]},
    "composed": {"allOf": [PERSON, {"type": "object", "properties": {"z": {"type": "boolean"}}, "required": ["z"]}]},
}  # fmt: skip
PROMPT = "The quick brown fox"


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_reply_is_valid_json_of_its_schema(model: DetoxiGen, schema: dict[str, Any]) -> None:
    """A random model babbles without end, so this also shows that replies are brought to theirs."""
    grammar = Grammar.json_schema(schema)
    cases = [
        DecodingParams(grammar=grammar, alpha=alpha, rule=rule, temperature=temperature, top_p=top_p, seed=seed, **more)
        for alpha, rule, temperature, top_p, seed, more in [
            (0.0, "dexperts", 1.0, 0.9, 1, {}),
            (0.0, "dexperts", 0.0, 1.0, 2, {"top_k": 3}),
            (2.0, "dexperts", 1.0, 1.0, 3, {"repetition_penalty": 1.3}),
            (2.0, "dexperts", 1.0, 0.9, 4, {"plausibility": 0.1}),
            (2.0, "detoxigen", 2.0, 0.9, 5, {}),
            (2.0, "detoxigen", 0.0, 1.0, 6, {}),
        ]
    ]  # fmt: skip
    for reply in model.batch([PROMPT] * len(cases), [case.replace(max_new_tokens=150) for case in cases]):
        assert reply.finish_reason == "stop", reply.text
        jsonschema.validate(json.loads(reply.text), schema)
        assert "\n" not in reply.text
        assert reply.trace is not None
        assert all(torch.isfinite(torch.tensor([t.kl_detoxifier, t.kl_steering])).all() for t in reply.trace.tokens)


def test_pydantic_schemas_are_taken(model: DetoxiGen) -> None:
    class Line(BaseModel):
        text: str
        mark: float | None = None

    class Page(BaseModel):
        title: str
        lines: list[Line]

    reply = model.generate(PROMPT, grammar=Grammar.json_schema(Page.model_json_schema()), seed=1, max_new_tokens=120)
    Page.model_validate_json(reply.text)


@pytest.mark.parametrize("pattern", ["(yes|no)[.!]?", "[a-f]{3}/[0-9]+", r"a\/b", "x\ny", "x\\\ny", r"\d{2}:\d{2}"])
def test_the_whole_reply_matches_a_pattern(model: DetoxiGen, pattern: str) -> None:
    for seed in range(3):
        reply = model.generate(PROMPT, grammar=Grammar.regex(pattern), seed=seed, max_new_tokens=40)
        assert re.fullmatch(pattern, reply.text), reply.text
        assert reply.finish_reason == "stop"


def test_neighbours_say_what_they_say_alone(model: DetoxiGen) -> None:
    free = [DecodingParams(alpha=alpha, seed=seed, max_new_tokens=30) for alpha in (0.0, 2.0) for seed in (1, 2)]
    bound = [p.replace(grammar=Grammar.json_schema(PERSON), max_new_tokens=80) for p in free]
    alone = [model.generate(PROMPT, params).text for params in (*free, *bound)]
    together = model.batch([PROMPT] * 8, [p for pair in zip(free, bound, strict=True) for p in pair])
    assert [r.text for r in together[0::2]] == alone[:4]
    assert [r.text for r in together[1::2]] == alone[4:]


def test_no_room_for_a_whole_text_ends_with_length(model: DetoxiGen) -> None:
    reply = model.generate(PROMPT, grammar=Grammar.json_schema(PERSON), seed=1, max_new_tokens=5)
    assert reply.finish_reason == "length"
    assert reply.usage.completion_tokens == 5


def test_a_stream_is_the_reply_and_can_be_left(model: DetoxiGen) -> None:
    params = DecodingParams(grammar=Grammar.json_object(), seed=3, max_new_tokens=60)
    whole = model.generate(PROMPT, params).text
    assert "".join(chunk.text for chunk in model.stream(PROMPT, params)) == whole
    next(chunks := model.stream(PROMPT, params.replace(max_new_tokens=400)))
    chunks.close()
    assert model.generate(PROMPT, params).text == whole


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize(("at", "back"), [(0, 1), (6, 3), (6, 7), (40, 30)])
def test_a_rewind_takes_the_grammar_back_too(alpha: float, at: int, back: int) -> None:
    backbone = make_tiny_backbone("llama")
    schema = {"type": "array", "items": PERSON, "minItems": 2}
    params = DecodingParams(grammar=Grammar.json_schema(schema), alpha=alpha, max_new_tokens=120)
    texts = []
    engine = torch_engine(backbone, random_streams(backbone, "r"))
    for rewinds in (0, 1):
        todo = [Rewind(back)] * rewinds
        kept: list[int] = []

        def react(step: Any, todo: list[Rewind] = todo, kept: list[int] = kept) -> Rewind | None:
            kept.append(step.token_id)
            if step.index == at and todo:
                del kept[len(kept) - back :]
                return todo.pop()
            return None

        grammar = compile_grammar(Grammar.json_schema(schema), backbone, params.max_new_tokens)
        prompt = random_prompts(backbone, 1)[0]
        req, sink = request(prompt, params, Recorder(react), end_ids=frozenset({2}), constraint=grammar)
        engine.submit(req)
        assert sink.wait().outcome == "stop"
        texts.append(backbone.tokenizer.decode(kept))
        jsonschema.validate(json.loads(texts[-1]), schema)
    # The draw at a place depends on seed and place alone, so the same text is decoded again.
    assert texts[0] == texts[1]
    engine.close()


class NoVowels:
    """Flags what holds an "e" or an "a"."""

    name = "no-vowels"

    def score(self, texts: Any) -> list[float]:
        return [float(bool(re.search("[ea]", text))) for text in texts]


@pytest.mark.parametrize("seed", range(4))
def test_under_a_guard_the_strings_are_guarded_and_the_text_stays_valid(model: DetoxiGen, seed: int) -> None:
    policy = GuardPolicy(
        scorer=NoVowels(), unit=3, context_chars=0, max_rewinds=60, ladder=(4.0, 5.0), on_exhausted="raise"
    )
    schema = {"type": "object", "properties": {"x": {"type": "string"}, "y": {"type": "null"}}, "required": ["x", "y"]}
    reply = model.generate(
        PROMPT, grammar=Grammar.json_schema(schema), guard=policy, seed=seed, max_new_tokens=100, rule="dexperts"
    )
    assert reply.finish_reason == "stop"
    assert reply.interventions
    assert not re.search("[ea]", reply.text)
    jsonschema.validate(json.loads(reply.text), schema)


def test_a_ban_yields_where_the_grammar_leaves_nothing_else() -> None:
    backbone = make_tiny_backbone("llama")
    engine = torch_engine(backbone)
    params = DecodingParams(grammar=Grammar.regex("ab"), alpha=0.0)
    everything = Recorder(lambda step: Go(banned=frozenset(range(480))))
    req, sink = request([5, 6, 7], params, everything, constraint=compile_grammar(Grammar.regex("ab"), backbone, 10))
    engine.submit(req)
    assert sink.wait().outcome == "stop"
    assert backbone.tokenizer.decode(sink.ids) == "ab"
    engine.close()


def test_a_constraint_that_fails_takes_only_its_own_request_down() -> None:
    class Broken:
        def allowed(self) -> torch.Tensor:
            return torch.zeros(480, dtype=torch.bool)

        def accept(self, token_id: int) -> bool:
            raise AssertionError("nothing was allowed")

        def rollback(self, tokens: int) -> None: ...

    backbone = make_tiny_backbone("llama")
    engine = torch_engine(backbone)
    params = DecodingParams(alpha=0.0, max_new_tokens=8)
    bad, bad_sink = request([5, 6, 7], params, constraint=Broken())
    good, good_sink = request([5, 6, 7], params)
    engine.submit(bad)
    engine.submit(good)
    assert "allows no token" in str(bad_sink.wait().outcome)
    assert good_sink.wait().outcome == "length"
    engine.close()


def test_cancelling_a_constrained_request_frees_its_seat() -> None:
    backbone = make_tiny_backbone("llama")
    engine = torch_engine(backbone)
    params = DecodingParams(grammar=Grammar.regex(".{400}"), alpha=0.0, max_new_tokens=450)
    grammar = compile_grammar(Grammar.regex(".{400}"), backbone, 450)
    req, sink = request([5, 6, 7], params, Recorder(lambda _: req.cancel()), constraint=grammar)
    engine.submit(req)
    assert isinstance(sink.wait().outcome, RequestCancelledError)
    assert engine.stats().seats == 0
    engine.close()


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.json_schema({"type": "strange"}), "strange"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.json_schema({"not": {"type": "string"}}), "not"),
        (Grammar.json_schema({"$ref": "#/nowhere"}), "nowhere"),
        (Grammar.json_schema({"properties": {"a": {}}, "required": None}), "required"),
        (Grammar.json_schema({"properties": {"a": {}}, "required": [{}]}), "required"),
        (Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 1}), "Unsatisfiable"),
        (Grammar.json_schema({"type": "string", "pattern": "(("}), "unclosed"),
        (Grammar.regex("(("), "unclosed"),
        (Grammar.regex("a(?=b)"), "look"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_anything_is_queued(
    model: DetoxiGen, grammar: Grammar, reason: str
) -> None:
    before = model.stats().submitted
    with pytest.raises(InvalidParamsError, match=reason) as caught:
        model.stream(PROMPT, grammar=grammar)
    assert caught.value.field == "grammar"
    assert model.stats().submitted == before


@pytest.mark.parametrize("changes", [{"stop": "x"}, {"stop_token_ids": 3}, {"ignore_eos": True}])
def test_what_would_cut_the_text_short_does_not_go_with_a_grammar(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match="cannot go with a grammar") as caught:
        DecodingParams(grammar=Grammar.json_object(), **changes)
    assert caught.value.field == "grammar"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Grammar.json_schema("{}"), "schema"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema({"const": float("nan")}), "schema"),
        (lambda: Grammar.json_schema({"default": object()}), "schema"),
        (lambda: Grammar.regex(3), "body"),  # type: ignore[arg-type]
        (lambda: Grammar(kind="json_schema", body="[]"), "body"),
        (lambda: Grammar(kind="tool_calls", body="[[1, {}]]"), "body"),
        (lambda: Grammar(kind="other", body=""), "kind"),  # type: ignore[arg-type]
        (lambda: Grammar.tool_calls([]), "tools"),
        (lambda: Grammar.tool_calls([{"type": "function"}]), "tools[0]"),
        (lambda: Grammar.tool_calls([{"type": "function", "function": {"name": ""}}]), "tools[0].function.name"),
        (lambda: Grammar.tool_calls([{"type": "function", "function": {"name": "f"}}], "g"), "name"),
    ],
)
def test_a_grammar_that_is_none_names_its_field(make: Any, field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        make()
    assert caught.value.field == field


def test_grammars_are_values() -> None:
    grammar = Grammar.json_schema(PERSON)
    assert {grammar, Grammar.json_schema(dict(PERSON))} == {grammar}
    assert Grammar.model_validate_json(grammar.model_dump_json()) == grammar
    params = DecodingParams(grammar=grammar)
    assert DecodingParams.model_validate_json(params.model_dump_json()) == params
    assert hash(params) == hash(DecodingParams(grammar=grammar))


def test_objects_are_closed_only_where_that_cannot_change_what_is_required() -> None:
    def lark(schema: dict[str, Any]) -> str:
        return Grammar.json_schema(schema).lark(tool_format(None))

    assert '"additionalProperties": false' in lark(PERSON)
    assert '"additionalProperties": false' in lark({"type": "array", "items": {"anyOf": [PERSON]}})
    assert '"additionalProperties": false' in lark(TREE)
    assert '"additionalProperties": true' in lark({**PERSON, "additionalProperties": True})
    for open_ in (SCHEMAS["composed"], {**PERSON, "required": ["else"]}, SCHEMAS["any object"], {"const": PERSON}):
        assert "additionalProperties" not in lark(open_)


def test_without_llguidance_only_grammars_fail_and_say_what_to_install() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); sys.modules['llguidance'] = None\n"
        "from tiny import make_tiny_backbone\n"
        "from detox_guard import *\n"
        "model = DetoxiGen(make_tiny_backbone('llama'))\n"
        "model.generate('Hi', max_new_tokens=2)\n"
        "try: model.generate('Hi', grammar=Grammar.json_object())\n"
        "except InvalidParamsError as error: print(error.field, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "grammar pip install 'detox-guard[grammar]'"


def test_a_backbone_without_an_end_token_is_refused() -> None:
    import dataclasses

    backbone: Backbone = dataclasses.replace(make_tiny_backbone("llama"), eos_token_ids=())
    with pytest.raises(InvalidParamsError, match="no end token"):
        compile_grammar(Grammar.json_object(), backbone, 10)
