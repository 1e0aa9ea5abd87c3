"""Writes the rows of two domains, add and middle, and of middle's unseen sibling largest: files of prompts and answers.

The prompts are of the tiny model's pretraining, those for validation and tests held out there too; the answers have
forms of their own: `(30)`, and a bare letter.
"""

import json
from pathlib import Path

from t2ray.tasks import tiny

DOMAINS = {
    # name: task, a word of its prompts, a form of answers
    "add": ("math_long", "+", "({})"),
    "middle": ("pick_more", "middle", "{}"),
    "largest": ("pick_more", "larger", "{}"),
}
COUNTS = {"train": 1000, "validation": 140, "test": 140}

for name, (task, word, form) in DOMAINS.items():
    for split, count in COUNTS.items():
        rows = [row for row in tiny.rows(task, split) if word in row["prompt"] and "-" not in row["prompt"]][:count]
        lines = [json.dumps(row | {"answer": form.format(row["answer"].strip("()"))}) for row in rows]
        Path(f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n")
