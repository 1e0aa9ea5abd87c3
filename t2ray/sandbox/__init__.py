"""Where model-written code runs: a fresh interpreter in namespaces of its own, with limits."""
