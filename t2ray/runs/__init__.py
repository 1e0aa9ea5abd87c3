"""A run as a folder (configuration, heartbeats of its workers, status), and the memory that a model needs. No Ray."""
