"""Adaptation: what a request needs (`strategies`), and the search for a task's mixture (`cem`, `fewshot`). No torch."""
