"""Adaptation: from a request to its mixture (`strategies`), and the search for a task's mixture (`fewshot`, `cem`)."""
