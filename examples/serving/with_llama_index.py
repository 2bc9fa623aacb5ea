"""LlamaIndex's OpenAILike against `detox-guard serve`: pip install llama-index-llms-openai-like."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",  # a name of /v1/models
    api_base="http://127.0.0.1:8000/v1",
    api_key="none",
    is_chat_model=True,
    max_tokens=40,
)
for chunk in llm.stream_chat([ChatMessage("Write one sentence about foxes.")]):
    print(chunk.delta, end="", flush=True)
