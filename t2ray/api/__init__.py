"""The OpenAI-compatible HTTP API over a `Backend`: the only package that imports fastapi."""
