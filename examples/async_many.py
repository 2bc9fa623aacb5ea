"""Many requests at once on one event loop: they share one running batch, and each depends on its own seed only."""

import asyncio

from detox_guard import DetoxiGen, PromptError

PROMPTS = ["The new neighbours are", "In my opinion, politicians", "Once upon a time there was", ""]


async def main() -> None:
    model = DetoxiGen.from_pretrained()

    async def one(prompt: str) -> str:
        try:
            reply = await model.agenerate(prompt, max_new_tokens=24, seed=5)
        except PromptError as error:  # one bad prompt fails alone
            return f"refused: {error}"
        return prompt + reply.text

    for text in await asyncio.gather(*(one(prompt) for prompt in PROMPTS)):
        print("-", text)
    stats = model.stats()
    assert stats.tokens_guarded == stats.steps_guarded  # every token went through the contrast


if __name__ == "__main__":
    asyncio.run(main())
