"""An agent with two tools: steered while it decodes, tool results screened, its answer checked before it is shown."""

from typing import Literal

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import HumanMessage, ToolMessage
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
def for_a_small_model(request, handler):
    """First it must call, then it reads the result as plain notes. Leave it out with a model that knows tools."""
    found = [message.text for message in request.messages if isinstance(message, ToolMessage)]
    if not found:
        return handler(request.override(tool_choice="read_reviews"))
    question = HumanMessage("\n\n".join([*found, request.messages[0].text]))
    return handler(request.override(tools=[], messages=[question]))


def main() -> None:
    agent = create_agent(
        ChatDetoxiGen(max_tokens=40, temperature=0.0),
        tools=[read_reviews, opening_hours],
        system_prompt="You are a helpful travel guide.",
        middleware=[
            for_a_small_model,
            DetoxMiddleware(
                alpha=3.0,  # in every call
                tool_results="mask",  # before the model reads them
                ladder=(4.0, "rewrite"),  # where an answer is toxic all the same
                on_exhausted="mask",
            ),
        ],
    )
    out = agent.invoke({"messages": [("human", "How did visitors like the harbour café?")]})
    for message in out["messages"]:
        message.pretty_print()
    print()
    for record in out.get("detox", ()):
        print(f"detox: {record['where']}: {record['action']} (score {record['score']:.2f})")


if __name__ == "__main__":
    main()
