"""LangChain's ChatOpenAI against `detox-guard serve`, with a structured answer."""

from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel


class Animal(BaseModel):
    """An animal."""

    name: str
    legs: int


url = "http://127.0.0.1:8000/v1"
name = OpenAI(base_url=url, api_key="none").models.list().data[0].id
llm = ChatOpenAI(base_url=url, api_key="none", model=name, max_tokens=60, extra_body={"detox": {"alpha": 4}})
print(llm.invoke("Write one sentence about foxes.").content)
print(llm.with_structured_output(Animal).invoke("Name an animal and its legs."))
