"""The backbone run by torch: rows of keys and values, prefill, decode. Knows no requests."""
