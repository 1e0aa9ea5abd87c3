"""The reward of tasks that bring only prompts and answers: the answer, exactly. Standard library only.

Called by the verifier for `t2ray adapt --task FILE` without `--reward`; a name for one's own training jobs too
(`reward: t2ray.tasks.equal:reward`, with the right answers in the column "answer").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """+1 when the completion is the row's "answer", but for white space around it; else -1."""
    return 1.0 if completion.strip() == str(row["answer"]).strip() else -1.0
