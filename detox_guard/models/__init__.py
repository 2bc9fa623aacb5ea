"""Where a backbone comes from, and what it can do. Knows transformers; knows no detoxifier and no decoding."""
