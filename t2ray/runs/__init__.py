"""A run as a folder: its configuration, the signs of life of its workers, and what both tell. No Ray."""
