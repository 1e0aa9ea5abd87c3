"""Trained vectors by name and version: the registry, following its changes, importing and exporting, heat maps."""
