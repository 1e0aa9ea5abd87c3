"""Generating and scoring with a mixture per row."""
