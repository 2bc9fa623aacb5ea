"""Detoxifiers and decoding that differ in one thing."""
