"""The official SDK against `detox-guard serve`: a stream, and how it was steered and guarded."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
name = client.models.list().data[0].id
messages = [{"role": "user", "content": "Tell me about my neighbour."}]
stream = client.chat.completions.create(
    model=name, messages=messages, max_tokens=40, seed=7, stream=True, extra_body={"detox": {"alpha": 4}}
)
for chunk in stream:
    choice = chunk.choices[0]
    print(choice.delta.content or "", end="", flush=True)
    if choice.finish_reason:
        print(f"\n[{choice.finish_reason}, {len(choice.detox['interventions'])} interventions]")
