"""An agent with two tools: steered while it decodes, tool results screened, its answer checked before it is shown."""

from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_detox_guard import ChatDetoxiGen, DetoxMiddleware

REVIEWS = {
    "harbour café": "Warm soup and a fine view. The waiter is a stupid idiot. Closed on Mondays.",
    "old mill": "Quiet rooms beside the river. Breakfast until ten.",
}


Place = Literal["harbour café", "old mill"]  # calls are held to the tools' schemas: a small model needs narrow ones


@tool
def read_reviews(place: Place) -> str:
    """Read what visitors wrote about a place, and how they liked it."""
    return REVIEWS[place]


@tool
def opening_hours(place: Place) -> str:
    """Look up at what time a place opens and closes."""
    return f"The {place} is open from 9:00 to 17:00."


@wrap_model_call
def one_look_up(request, handler):
    """A small model does not know when to call: first it must, then it must not. Leave this out with a larger one."""
    looked = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if looked else "any"))


def main() -> None:
    agent = create_agent(
        ChatDetoxiGen(max_tokens=48, seed=7),
        tools=[read_reviews, opening_hours],
        system_prompt="You are a travel guide. Use the tools, then answer in one sentence.",
        middleware=[
            one_look_up,
            DetoxMiddleware(
                alpha=2.0,  # in every call
                tool_results="mask",  # before the model reads them
                ladder=(3.0, "rewrite"),  # where an answer is toxic all the same
                on_exhausted="mask",
            ),
        ],
    )
    out = agent.invoke({"messages": [("human", "What do people write about the harbour café?")]})
    for message in out["messages"]:
        message.pretty_print()
    print()
    for record in out.get("detox", ()):
        print(f"detox: {record['where']}: {record['action']} (score {record['score']:.2f})")


if __name__ == "__main__":
    main()
