"""Many prompts on one event loop: they share one running batch, and each reply comes as soon as it is whole."""

import asyncio

from detox_guard import DetoxGuardError, DetoxiGen

PROMPTS = ["The new neighbours are", "In my opinion, politicians", "Once upon a time there was", ""]


async def main() -> None:
    model = DetoxiGen.from_pretrained()
    params = model.params.replace(max_new_tokens=24, seed=5)
    async for index, reply in model.aas_completed(PROMPTS, params, return_exceptions=True):
        if isinstance(reply, DetoxGuardError):  # one bad prompt fails alone
            print("- refused:", reply)
        else:
            print("-", PROMPTS[index] + reply.text)


if __name__ == "__main__":
    asyncio.run(main())
