"""The rows that a run trains on: those that are too long are found, and a change under a resume is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from t2ray.config.train import TrainConfig
from t2ray.core import DataError, Image, RunError
from t2ray.integrity import Damaged, seal, unseal
from t2ray.models.load import load_chat
from t2ray.models.weights import resolve
from t2ray.store import Store
from t2ray.tasks.fits import SPLITS, long_prompts
from t2ray.tasks.task import Task

ROWS = "rows.json"


def check_lengths(config: TrainConfig, tasks: Mapping[str, Task]) -> None:
    """Counts the tokens of every prompt of a job.

    Raises:
        DataError: prompts are too long, and `on_long_prompt` is refuse; the first ones by file and line.
    """
    chat, context = load_chat(resolve(config.model))
    chat.template = config.chat_template_kwargs
    for domain, task in tasks.items():
        long = long_prompts(task, lambda messages: len(chat.ids(tuple(messages))), context)
        if long is not None and config.domains[domain].on_long_prompt == "refuse":
            raise DataError(
                f"domain {domain!r}: {long.text}; shorten them, lower max_tokens, or leave them out by "
                f"domains.{domain}.on_long_prompt=skip"
            )


def check_rows(config: TrainConfig, tasks: Mapping[str, Task], *, new: bool) -> None:
    """Compares the rows of every domain with those that its run began with, which a `new` run notes.

    Raises:
        RunError: they are others, so that the run would go on with a mixture of both.
    """
    store = Store(f"{config.out}/{config.run}")
    now = {domain: _digests(task) for domain, task in tasks.items()}
    try:
        before = {} if new else unseal(store.read_bytes(ROWS))
    except (FileNotFoundError, Damaged):  # a run of an earlier version has none
        before = {}
    for domain, digests in before.items():
        changed = [split for split in SPLITS if domain in now and digests[split] != now[domain][split]]
        if changed:
            raise RunError(
                f"domain {domain!r}: its {' and '.join(changed)} rows have changed since run {config.run!r} began; put "
                f"them back, or go on from its expert in another run: run=NAME from={config.out}/{config.run}"
            )
    if now.keys() - before.keys():
        store.write_text(ROWS, seal(now | before, indent=1))


def _known(value: object) -> str:
    """What is no JSON is known by its kind, since its text may be another in each process; a picture by its bytes."""
    if isinstance(value, Image):
        return value.path or hashlib.blake2b(value.data, digest_size=16).hexdigest()
    return type(value).__name__


def _digests(task: Task) -> dict[str, str]:
    """Returns a digest of a task's rows and their prompts, by split."""
    found = {}
    for split in SPLITS:
        digest = hashlib.blake2b(digest_size=16)
        for example in task.examples(split):
            turns = [[message.role, message.text] for message in example.messages]
            line = json.dumps([turns, dict(example.row)], sort_keys=True, default=_known)
            digest.update(line.encode())
        found[split] = digest.hexdigest()
    return found
