"""An agent with tools. The default model is too small to plan: its first call is forced, and so always valid."""

import asyncio
from typing import Literal

from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.llms.detox_guard import DetoxiGenLLM

PRICES = {"apple": 0.4, "pear": 0.6, "melon": 2.9}


def price(fruit: Literal["apple", "pear", "melon"]) -> str:
    """The price of one fruit in euros."""
    return f"One {fruit} costs {PRICES[fruit]:.2f} euros."


async def main() -> None:
    # The default model's chat template knows no tools; `function_calling=True` tells it of them in plain words.
    llm = DetoxiGenLLM(function_calling=True, max_new_tokens=40, temperature=0.3, seed=1)
    agent = FunctionAgent(
        tools=[price],
        llm=llm,
        system_prompt="You are a greengrocer. Look prices up, then answer in one sentence.",
        initial_tool_choice="price",
    )
    memory = ChatMemoryBuffer.from_defaults(token_limit=1500, tokenizer_fn=llm.encode)
    handler = agent.run("What does an apple cost?", memory=memory, max_iterations=4, early_stopping_method="generate")
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print("tool:", event.tool_name, event.tool_kwargs, "->", event.tool_output.content)
    print("answer:", str(await handler).strip())


if __name__ == "__main__":
    asyncio.run(main())
