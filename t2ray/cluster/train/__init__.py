"""Training, sweeps and decomposition on Ray."""
