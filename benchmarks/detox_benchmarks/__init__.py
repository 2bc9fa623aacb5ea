"""The laboratory of detox-guard: what the tables in `docs/` are made with. In no wheel; nothing imports it."""
