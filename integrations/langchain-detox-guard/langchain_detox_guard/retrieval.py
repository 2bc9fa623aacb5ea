"""Retrieved documents, screened before a model reads them; and a RAG chain that does so. Knows documents, no model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detox_guard import GuardPolicy, field_of, screen
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnablePassthrough, RunnableSerializable
from pydantic import ConfigDict, Field, field_validator

from langchain_detox_guard._settings import Settings, no_bool, refuse_scorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
    from langchain_core.language_models import LanguageModelLike
    from langchain_core.prompts import BasePromptTemplate
    from langchain_core.runnables import Runnable

PROMPT = ChatPromptTemplate.from_messages(
    [
        (
            "system",
            "Answer the question with the passages below, in one or two sentences. "
            "If they do not say, answer that you do not know.\n\n{context}",
        ),
        ("human", "{input}"),
    ]
)


class DetoxDocumentScreen(Settings, RunnableSerializable[list[Document], list[Document]]):
    """Documents in, documents out: `retriever | DetoxDocumentScreen()`.

    Each is scored as a whole and sentence by sentence; one that scores above `threshold` is flagged. `action`:
    "drop" it, "mask" its toxic sentences, or "mark" it. Every document that passes has `toxicity` and
    `toxicity_flagged` in its metadata; those that came in are not changed. `scorer` as in `detox_guard.load_scorer`; an
    object of your own is shared by deep copies and not pickled (`NotPicklableError`).
    Raises `InvalidParamsError` for a bad field, and `ScorerError` if the scorer fails: nothing unscored is passed on.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    action: Literal["drop", "mask", "mark"] = "mask"
    threshold: float = field_of(GuardPolicy, "threshold", ge=0, le=1)
    scorer: Any = None
    _shared: ClassVar = ("scorer",)

    _numbers = field_validator("threshold", mode="before")(no_bool)

    @field_validator("scorer", mode="before")
    @classmethod
    def _scores(cls, value: object) -> object:
        if value is not None and not isinstance(value, str) and not callable(getattr(value, "score", None)):
            raise ValueError("Input should be a name, or an object with .name and .score()")
        return value

    def __getstate__(self) -> dict[Any, Any]:
        """Raises `NotPicklableError`."""
        refuse_scorer(self.scorer)
        return super().__getstate__()

    def invoke(self, input: Sequence[Document], config: RunnableConfig | None = None, **_: Any) -> list[Document]:
        """The documents that may be read."""
        return self._call_with_config(self._screen, list(input), config)

    async def ainvoke(
        self, input: Sequence[Document], config: RunnableConfig | None = None, **_: Any
    ) -> list[Document]:
        """The same, scored off the event loop."""

        async def screened(documents: list[Document]) -> list[Document]:
            return await asyncio.to_thread(self._screen, documents)

        return await self._acall_with_config(screened, list(input), config)

    def _screen(self, documents: list[Document]) -> list[Document]:
        texts = [document.page_content for document in documents]
        results = screen(texts, scorer=self.scorer, threshold=self.threshold, action=self.action)
        return [
            document.model_copy(
                update={
                    "page_content": one.text,
                    "metadata": {**document.metadata, "toxicity": one.score, "toxicity_flagged": one.flagged},
                }
            )
            for document, one in zip(documents, results, strict=True)
            if one.text is not None
        ]


class DetoxRetriever(BaseRetriever):
    """Another retriever, screened: wherever a retriever is wanted, such as `create_retriever_tool`."""

    retriever: RetrieverLike
    screen: DetoxDocumentScreen = Field(default_factory=DetoxDocumentScreen)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        config = RunnableConfig(callbacks=run_manager.get_child())
        return self.screen.invoke(self.retriever.invoke(query, config), config)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun
    ) -> list[Document]:
        config = RunnableConfig(callbacks=run_manager.get_child())
        return await self.screen.ainvoke(await self.retriever.ainvoke(query, config), config)


def create_detox_rag_chain(
    retriever: RetrieverLike,
    model: LanguageModelLike,
    *,
    prompt: BasePromptTemplate[Any] | None = None,
    screen: DetoxDocumentScreen | None = None,
) -> Runnable[Any, dict[str, Any]]:
    """Question → retriever → screen → prompt → model. Takes a string, or `{"input": …}` with what else `prompt` wants.

    Gives `{"input", "context", "answer"}`: `context` are the documents as the model read them, `answer` a string.
    `stream` gives the same in pieces, the answer's as they are decoded. `prompt` has `{input}` and `{context}`.
    """

    def passages(values: dict[str, Any]) -> str:
        return "\n\n".join(f"[{i}] {one.page_content}" for i, one in enumerate(values["context"], start=1))

    asked = RunnableLambda(_as_input).with_config(run_name="question")
    retrieved = RunnableLambda(_question) | retriever | (screen or DetoxDocumentScreen())
    answer = RunnablePassthrough.assign(context=passages) | (prompt or PROMPT) | model | StrOutputParser()
    return asked | RunnablePassthrough.assign(context=retrieved.with_config(run_name="retrieve_and_screen")).assign(
        answer=answer.with_config(run_name="answer")
    )


def _as_input(value: str | dict[str, Any]) -> dict[str, Any]:
    return {"input": value} if isinstance(value, str) else value


def _question(values: dict[str, Any]) -> str:
    return str(values["input"])
