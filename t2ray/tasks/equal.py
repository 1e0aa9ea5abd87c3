"""The reward of tasks that have only prompts and answers: the completion must be the answer. Standard library only.

`t2ray adapt --task FILE` uses it unless `--reward` names another. A training job can name it too:
`reward: t2ray.tasks.equal:reward`, with the right answers in the column "answer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """+1 if the completion equals the row's "answer", up to white space around them, else -1."""
    return 1.0 if completion.strip() == str(row["answer"]).strip() else -1.0
