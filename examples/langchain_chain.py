"""A LangChain chain whose model is steered away from toxicity: one line differs from any other LLM."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_detox_guard import DetoxiGenLLM


def main() -> None:
    llm = DetoxiGenLLM(max_tokens=24, seed=7)  # loads nothing yet; the first call does
    prompt = PromptTemplate.from_template("{speaker} looked at the {thing} and thought of")
    chain = prompt | llm.bind(stop=[".", "\n"]) | StrOutputParser()

    print("invoke:", chain.invoke({"speaker": "My neighbour", "thing": "broken fence"}))

    print("stream: ", end="")
    for piece in chain.stream({"speaker": "The coach", "thing": "score"}):
        print(piece, end="", flush=True)
    print()

    # One batch in the engine, not three turns.
    things = ["weather", "old bus", "new menu"]
    for thing, text in zip(things, chain.batch([{"speaker": "She", "thing": t} for t in things]), strict=True):
        print(f"batch:  {thing}: {text}")

    # Every field is a per-call keyword too. alpha=0 is the plain model.
    for alpha in (0.0, 3.0, 5.0):
        result = llm.generate(["So, I'm starting to think she's full of"], alpha=alpha)
        info = result.generations[0][0].generation_info or {}
        steered = info["detox"]["mean_kl_steering"]
        print(f"alpha {alpha:g}, steered by {steered:.2f} nats a token: {result.generations[0][0].text!r}")


if __name__ == "__main__":
    main()
