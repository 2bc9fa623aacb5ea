"""Structured output of a chat model, or of what is around one. Knows schemas and parsers; knows no wrapper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detox_guard import IncompleteAnswerError, InvalidParamsError
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.utils.pydantic import is_basemodel_subclass

from langchain_detox_guard.tools import UNFINISHED, schema_of, tool_of

if TYPE_CHECKING:
    from langchain_core.language_models.base import LanguageModelInput
    from langchain_core.messages import AIMessage
    from langchain_core.runnables import Runnable


def structured(
    model: Runnable[LanguageModelInput, AIMessage],
    schema: Any,
    method: str = "json_schema",
    include_raw: bool = False,
    strict: bool | None = None,
    **kwargs: Any,
) -> Runnable[LanguageModelInput, Any]:
    """`with_structured_output` of a chat model, or of one with keywords and a config around it."""
    if schema is None and method != "json_mode":
        raise InvalidParamsError("schema", schema, f"needed by method {method!r}")
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: Any
    if method == "function_calling":
        shown = tool_of(schema, "schema")
        name = shown["function"]["name"]
        bound: dict[str, Any] = {"tools": [shown], "tool_choice": name}
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_class
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    elif method in ("json_schema", "json_mode"):
        own = None if schema is None else schema_of(schema)
        # A pydantic class looks at the answer again, so what no grammar can hold to is left to it.
        asked = {"schema": own, "strict": not is_class}
        named = {"type": "json_schema", "json_schema": asked}
        bound = {"response_format": named if method == "json_schema" else {"type": "json_object", **asked}}
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    else:
        raise InvalidParamsError("method", method, "json_schema, function_calling or json_mode")
    traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    if include_raw:
        bound["unfinished"] = "keep"
    llm = model.bind(**bound, **kwargs, **({} if schema is None else {"ls_structured_output_format": traced}))
    if not include_raw:
        return llm | parser  # type: ignore[no-any-return]
    parse = RunnableLambda(_finished) | parser

    def told(raw: AIMessage, config: RunnableConfig) -> dict[str, Any]:
        try:
            return {"raw": raw, "parsed": parse.invoke(raw, config), "parsing_error": None}
        except Exception as error:
            return {"raw": raw, "parsed": None, "parsing_error": error}

    async def atold(raw: AIMessage, config: RunnableConfig) -> dict[str, Any]:
        try:
            return {"raw": raw, "parsed": await parse.ainvoke(raw, config), "parsing_error": None}
        except Exception as error:
            return {"raw": raw, "parsed": None, "parsing_error": error}

    # The model comes first: only the first step of a sequence is told what is bound to it, and what a call sets.
    return llm | RunnableLambda(told, atold, name="parse")


def _finished(message: AIMessage) -> AIMessage:
    """Raise `IncompleteAnswerError` for a structured answer that is not whole."""
    reason = message.response_metadata.get("finish_reason")
    if reason in UNFINISHED:
        raise IncompleteAnswerError(reason)
    return message
