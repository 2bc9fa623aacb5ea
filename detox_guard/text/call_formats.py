"""How models write tool calls, one reader a form. Knows whole blocks; `text.calls` cuts them out of a stream.

Every reader takes the text of a block, without its outer tags, and gives `(name, arguments)` of all its calls, or
nothing if any of it is no call. None raises, and each takes time in proportion to the text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from detox_guard._plain import as_plain, decoded, decoded_whole, json_fault

__all__ = ["FORMS", "KEPT_TOKENS", "Form", "read_bare"]

Calls = list[tuple[str, dict[str, Any]]]
Types = Mapping[str, Mapping[str, Any]]
"""The properties of each tool's parameters, by its name."""

_NAME = r"[A-Za-z_][\w.:-]*"
_BETWEEN = re.compile(r"[\s;,]*")
_ARGUMENTS = ("arguments", "parameters")
_BESIDE_A_NAME = {"name", "id", "type", "function", "tool_name", "tool_call_id", *_ARGUMENTS}
_MOST_PYTHON = 100_000
"""Characters of a pythonic call that are given to Python's parser."""


class Form(NamedTuple):
    """A way to write calls: what opens and closes a block, what must follow for it to be one, and how it is read."""

    open: str
    close: str
    """Empty: the reply's end."""
    begins: tuple[str, ...]
    """What a block may begin with, behind white space; `name` stands for a name. Else the tag is only named."""
    read: Callable[[str, Types], Calls]


# --- JSON ------------------------------------------------------------------------------------------------------------


def _call_of(item: object, *, arguments_needed: bool) -> tuple[str, dict[str, Any]] | None:
    """The call that a JSON value is, in any of the usual spellings."""
    if not isinstance(item, dict):
        return None
    call: dict[str, Any] = item["function"] if isinstance(item.get("function"), dict) else item
    name = next((call[key] for key in ("name", "tool_name", "function") if isinstance(call.get(key), str)), "")
    given = [call[key] for key in _ARGUMENTS if key in call]
    if not name or (not given and (arguments_needed or call.keys() - _BESIDE_A_NAME)):
        return None
    arguments: Any = next((one for one in given if one is not None), {})
    if isinstance(arguments, str):  # some models quote them
        try:
            arguments = decoded_whole(arguments) if arguments.strip() else {}
        except ValueError:
            return None
    return (name, arguments) if isinstance(arguments, dict) else None


def _json(text: str, _: Types, *, arguments_needed: bool = False) -> Calls:
    """Objects, or lists of them, one after another; between them white space, `;` or `,`."""
    calls: Calls = []
    at = len(text) - len(text.lstrip())
    while at < len(text):
        try:
            value, at = decoded(text, at)
        except ValueError:
            return []
        for item in value if isinstance(value, list) else [value]:
            call = _call_of(item, arguments_needed=arguments_needed)
            if call is None:
                return []
            calls.append(call)
        at = _end(_BETWEEN, text, at)
    return calls


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


# --- tags ------------------------------------------------------------------------------------------------------------

_FUNCTION = re.compile(rf"\s*<function=\s*({_NAME})\s*>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)(?:</parameter>|(?=<parameter=)|(?=</function>)|\Z)", re.DOTALL)
_GLM = re.compile(rf"\s*({_NAME})\s*(?=<arg_key>|\Z)")
_GLM_ARGUMENT = re.compile(r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_OBJECT = re.compile(r"\s*(?={)")
_END_OF_FUNCTION = re.compile(r"\s*</function>\s*")


def _tagged(text: str, types: Types) -> Calls:
    """What stands between `<tool_call>` tags: JSON, Qwen3-Coder's tags or GLM's."""
    if _FUNCTION.match(text):
        return _functions(text, types)
    return _glm(text, types) if _GLM.match(text) else _json(text, types)


def _functions(text: str, types: Types) -> Calls:
    """`<function=name>`, then `<parameter=name>` blocks or a JSON object, then `</function>`; several in a row."""
    calls: Calls = []
    at = 0
    while opened := _FUNCTION.match(text, at):
        name, at = opened[1], opened.end()
        arguments: dict[str, Any] = {}
        if opened := _OBJECT.match(text, at):
            try:
                arguments, at = decoded(text, opened.end())
            except ValueError:
                return []
        else:
            while found := _PARAMETER.match(text, at):
                key = found[1].strip()
                arguments[key] = _typed(_unwrapped(found[2]), types.get(name, {}).get(key))
                at = found.end()
        calls.append((name, arguments))
        at = _end(_END_OF_FUNCTION, text, at)
    return [] if text[at:].strip() else calls


def _glm(text: str, types: Types) -> Calls:
    opened = _GLM.match(text)
    assert opened
    name, at, arguments = opened[1], opened.end(), {}
    while found := _GLM_ARGUMENT.match(text, at):
        key = found[1].strip()
        arguments[key] = _typed(_unwrapped(found[2]), types.get(name, {}).get(key))
        at = found.end()
    return [] if text[at:].strip() else [(name, arguments)]


def _unwrapped(text: str) -> str:
    """Without the line breaks that the tags stand on."""
    return text.removeprefix("\n").removesuffix("\n")


def _typed(text: str, schema: object) -> Any:
    """An argument that was written without quotes, as its schema has it; of an unknown type: an object or a list as
    such, all else as text, which every taker of numbers takes too."""
    kinds = _kinds(schema)
    bare = text.strip()
    if "string" in kinds and not (bare == "null" and "null" in kinds):
        return text
    try:
        value = decoded_whole(bare)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(bare, text) if kinds else text
    return value if kinds or isinstance(value, dict | list) else text


def _kinds(schema: object) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type", [])
    kinds = {kind} if isinstance(kind, str) else {one for one in kind if isinstance(one, str)}
    if isinstance(schema.get("enum"), list) and any(isinstance(one, str) for one in schema["enum"]):
        kinds.add("string")
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            if isinstance(branch, Mapping) and isinstance(branch.get("type"), str):
                kinds.add(branch["type"])
    return kinds


# --- Mistral ---------------------------------------------------------------------------------------------------------

_MISTRAL_NAMED = re.compile(rf"({_NAME})\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\]\s*)?(?={{)")
_MISTRAL_BETWEEN = re.compile(r"(?:[\s;,]|\[TOOL_CALLS\])*")


def _mistral(text: str, types: Types) -> Calls:
    """A list of objects, or the newer `name[ARGS]{…}`, with `[TOOL_CALLS]` between them."""
    calls: Calls = []
    at = _end(_MISTRAL_BETWEEN, text, 0)
    while at < len(text):
        named = _MISTRAL_NAMED.match(text, at)
        try:
            value, at = decoded(text, named.end() if named else at)
        except ValueError:
            return []
        for item in value if isinstance(value, list) else [value]:
            call = (named[1], item) if named else _call_of(item, arguments_needed=False)
            if call is None or not isinstance(call[1], dict):
                return []
            calls.append(call)
        at = _end(_MISTRAL_BETWEEN, text, at)
    return calls


# --- Python ----------------------------------------------------------------------------------------------------------

_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = "\n\\'\"abfnrtvxuUN01234567"


def _python_or_json(text: str, types: Types) -> Calls:
    return _python(text) or _json(text, types)


def _python(text: str) -> Calls:
    """`[f(x=1), g()]`, or calls with `;` or line breaks between them, as Llama 3.2 and 4 write."""
    if len(text) > _MOST_PYTHON:
        return []
    # A backslash that escapes nothing stands for itself; Python would warn of it.
    text = _ESCAPE.sub(lambda found: found[0] if found[1] in _ESCAPED else "\\" + found[0], text.strip())
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes: list[ast.expr] = []
    for statement in body:
        if not isinstance(statement, ast.Expr):
            return []
        nodes += statement.value.elts if isinstance(statement.value, ast.List) else [statement.value]
    calls = [_python_call(node) for node in nodes]
    return [call for call in calls if call] if all(calls) else []


def _python_call(node: ast.expr) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    arguments = {}
    try:
        name = _dotted(node.func).removesuffix(".call")
        for keyword in node.keywords:
            arguments[str(keyword.arg)] = ast.literal_eval(_AsPython().visit(keyword.value))
            if keyword.arg is None:
                return None
    except (ValueError, TypeError, RecursionError, MemoryError, SyntaxError):
        return None
    return None if json_fault(arguments) else (name, as_plain(arguments))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("no name")
    return node.id


class _AsPython(ast.NodeTransformer):
    """JSON's names of constants as Python's; any other bare word as the text that it is."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant({"true": True, "false": False, "null": None}.get(node.id, node.id))


# --- others ----------------------------------------------------------------------------------------------------------

_DEEPSEEK = re.compile(r"\s*<｜tool▁call▁begin｜>([^<]*)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>\s*", re.DOTALL)
_KIMI = re.compile(
    r"\s*<\|tool_call_begin\|>([^<]*)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>\s*", re.DOTALL
)
_FENCE = re.compile(r"([^\n`]+)\n```(?:json)?\n(.*?)\n?```", re.DOTALL)


def _deepseek(text: str, _: Types) -> Calls:
    return _pairs(text, _DEEPSEEK)


def _kimi(text: str, _: Types) -> Calls:
    # An id such as "functions.weather:0" stands where others have the name.
    calls = _pairs(text, _KIMI)
    return [(re.sub(r":\d+$", "", name).removeprefix("functions."), arguments) for name, arguments in calls]


def _pairs(text: str, pattern: re.Pattern[str]) -> Calls:
    calls: Calls = []
    at = 0
    while found := pattern.match(text, at):
        name, arguments = found[1].strip(), found[2].strip()
        if name == "function" and (fenced := _FENCE.fullmatch(arguments)):  # DeepSeek V3 and R1
            name, arguments = fenced[1].strip(), fenced[2]
        try:
            value = decoded_whole(arguments) if arguments else {}
        except ValueError:
            return []
        if not isinstance(value, dict) or not name:
            return []
        calls.append((name, value))
        at = found.end()
    return [] if text[at:].strip() else calls


def _gemma(text: str, _: Types) -> Calls:
    """`call:name{key:<|"|>text<|"|>}`, which transformers knows how to read."""
    found = re.fullmatch(rf"\s*call:({_NAME})\s*({{.*}})\s*", text, re.DOTALL)
    if not found:
        return []
    from transformers.utils.chat_parsing.content_parsers import parse_content

    try:
        dialect = {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]}
        value = parse_content(found[2], "json", dialect)
    except (ValueError, RecursionError):
        return []
    return [(found[1], as_plain(value))] if isinstance(value, dict) and not json_fault(value) else []


def _named_function(text: str, types: Types) -> Calls:
    return _functions("<function=" + text + "</function>", types)


_JSON_BEGINS = ('{"', "{'", "{{", "{}", "[{", "[[", "[]")
FORMS: Sequence[Form] = (
    Form("<tool_call>", "</tool_call>",
         (*_JSON_BEGINS, "<function=", "</tool_call>", "name<arg_key>", "name</tool_call>"), _tagged),
    Form("<function=", "</function>", ("name><parameter=", "name>{", "name></function>"), _named_function),
    Form("[TOOL_CALLS]", "", ("{", "[{", "name[ARGS]", "name[CALL_ID]", "name{"), _mistral),
    Form("<|python_start|>", "<|python_end|>", ("{", "[", "name("), _python_or_json),
    Form("<|python_tag|>", "", ("{", "[", "name("), _python_or_json),
    Form("<|tool_call|>", "<|/tool_call|>", _JSON_BEGINS, _json),
    Form("<|tool_call>", "<tool_call|>", ("call:",), _gemma),
    Form("<|START_ACTION|>", "<|END_ACTION|>", _JSON_BEGINS, _json),
    Form("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", ("<｜tool▁call▁begin｜>",), _deepseek),
    Form("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", ("<|tool_call_begin|>",), _kimi),
)  # fmt: skip

KEPT_TOKENS = (
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>",
    "<|tool_call>", "<tool_call|>", '<|"|>', "<|START_ACTION|>", "<|END_ACTION|>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)  # fmt: skip
"""Special tokens that a reply keeps as text: without them its calls could not be read."""


def read_bare(text: str, types: Types) -> Calls:
    """A whole reply that is nothing but calls, without tags: JSON with arguments, or Python."""
    return _json(text, types, arguments_needed=True) or (_python(text) if text.lstrip().startswith("[") else [])
