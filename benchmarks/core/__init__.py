"""The core alone: rows, folds, updates, rollouts and searches, compared with their peers."""
