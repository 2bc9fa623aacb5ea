"""LiteLLM against `detox-guard serve`: pip install litellm."""

import litellm

reply = litellm.completion(
    model="openai/HuggingFaceTB/SmolLM2-135M-Instruct",  # a name of /v1/models
    api_base="http://127.0.0.1:8000/v1",
    api_key="none",
    messages=[{"role": "user", "content": "Write one sentence about foxes."}],
    max_tokens=40,
)
print(reply.choices[0].message.content)
