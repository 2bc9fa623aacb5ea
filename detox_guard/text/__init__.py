"""Prompts, replies, tool calls and grammars as text and token ids. Knows tokenizers; knows no engine and no scorer."""
