"""The endpoint: its speed beside its engine, and hours of mixed load."""
