"""The core alone: rows, folds, updates, rollouts and searches beside their peers."""
