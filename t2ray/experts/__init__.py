"""Trained vectors by name and version: where they lie, how a reader follows them, how they come in and go out."""
