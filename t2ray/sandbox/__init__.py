"""The sandbox in which model-written code runs: a fresh interpreter in namespaces of its own, with limits."""
