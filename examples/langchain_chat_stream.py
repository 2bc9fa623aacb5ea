"""A chat bot that streams, remembers, and releases each sentence only after it was scored.

Type your turns, or pass them as arguments: python langchain_chat_stream.py "Hello!" "Tell me about foxes."
"""

import sys
from collections.abc import Iterator

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, trim_messages
from langchain_detox_guard import ChatDetoxiGen

from detox_guard import GuardPolicy


class Bot:
    """One conversation."""

    def __init__(self, **options: object) -> None:
        self.model = ChatDetoxiGen(guard=GuardPolicy(), **options)
        self.messages: list[BaseMessage] = [SystemMessage("You are a friendly guide. Answer in one or two sentences.")]

    def say(self, text: str) -> Iterator[str]:
        """The reply, piece by piece; both turns are then part of the conversation."""
        self.messages.append(HumanMessage(text))
        reply = None
        for chunk in self.model.stream(self._recent()):
            reply = chunk if reply is None else reply + chunk
            yield chunk.text
        if reply is not None:
            self.messages.append(AIMessage(reply.text))
            self.last = reply.response_metadata["detox"], reply.usage_metadata

    def _recent(self) -> list[BaseMessage]:
        """What fits: counted by the model's own tokenizer, the system message kept."""
        return trim_messages(
            self.messages, max_tokens=1024, token_counter=self.model, include_system=True, start_on="human"
        )


def turns() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.argv[1:] or ["Hello! Who are you?", "Why do foxes sleep by day?"]
        return
    while line := input("you: ").strip():
        yield line


def main() -> None:
    bot = Bot(max_tokens=32, seed=7)
    for turn in turns():
        print(f"you: {turn}\nbot: ", end="")
        for piece in bot.say(turn):
            print(piece, end="", flush=True)
        detox, usage = bot.last
        steered, retaken = detox["mean_kl_steering"], len(detox["interventions"])
        print(f"\n     [{usage['output_tokens']} tokens, steered by {steered:.2f} nats each, {retaken} taken back]")


if __name__ == "__main__":
    main()
