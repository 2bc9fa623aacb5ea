"""Answers from documents with toxic comments among them, in LangChain and LlamaIndex."""
