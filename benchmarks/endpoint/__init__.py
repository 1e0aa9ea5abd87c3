"""The endpoint: its speed compared with its engine's, and hours of mixed load."""
