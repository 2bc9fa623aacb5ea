"""The synthesizer hook around a foreign LLM: each sentence is held until it is judged, then passed or replaced."""

from collections.abc import Iterator
from typing import Any

from llama_index.core.base.llms.types import CompletionResponse, LLMMetadata
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.detox_guard import get_detox_response_synthesizer

from detox_guard import GuardPolicy

PASSAGES = [
    "The museum opens at ten. Entry is free on the first Sunday of the month.",
    "Visitor's note: the guards are stupid idiots. The café on the second floor closes at five.",
]
ANSWER = "The museum opens at ten. Only a stupid idiot would come before that. Entry is free on the first Sunday."


class SomeLLM(CustomLLM):
    """Stands for any LLM of LlamaIndex, hosted ones too. This one is rude."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="some-llm", context_window=4096, num_output=128)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=ANSWER)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Iterator[CompletionResponse]:
        words = ANSWER.split(" ")
        return (
            CompletionResponse(text=" ".join(words[: i + 1]), delta=f" {word}" if i else word)
            for i, word in enumerate(words)
        )


def main() -> None:
    synthesizer = get_detox_response_synthesizer(
        SomeLLM(), policy=GuardPolicy(threshold=0.5, on_exhausted="replace"), context="mask", streaming=True
    )  # or: index.as_query_engine(response_synthesizer=synthesizer)
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in PASSAGES]
    response = synthesizer.synthesize("When does the museum open?", nodes)
    for delta in response.response_gen:
        print(delta, end="", flush=True)
    report = response.metadata["detox"]
    print(f"\n{len(report['screened'])} passage screened, {len(report['interventions'])} sentence replaced")
    for source in response.source_nodes:
        print("  source:", source.node.get_content())


if __name__ == "__main__":
    main()
