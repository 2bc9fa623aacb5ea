"""A chat reply, streamed; leaving the loop early frees the seat at once."""

from detox_guard import DetoxiGen


def main() -> None:
    model = DetoxiGen.from_pretrained()
    messages = [
        {"role": "system", "content": "You are a short-spoken assistant."},
        {"role": "user", "content": "My flatmate never does the dishes. What should I tell him?"},
    ]
    for chunk in model.stream(messages, max_new_tokens=60, seed=3, stop=["\n\n"]):
        print(chunk.text, end="", flush=True)
        if chunk.generation:
            print(f"\n[{chunk.finish_reason}, {chunk.generation.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    main()
