"""Next-token training: the right answers of a task in the place of sampled ones."""

from __future__ import annotations

from collections.abc import Sequence

from t2ray.core import Completion, DataError, Example, Mixture, Token
from t2ray.grades import Grade, Rollout
from t2ray.models.chat import Chat
from t2ray.tasks.task import Task


def right_answers(chat: Chat, context: int, task: Task, examples: Sequence[Example]) -> list[Rollout]:
    """Each example's right answer as a rollout of reward 1; its likelihood is then what is trained.

    Raises:
        DataError: an example with its answer is longer than the context.
    """
    assert task.gold is not None, task.name
    rollouts = []
    for example in examples:
        text = task.gold(example.row)
        prompt_ids, answer_ids = chat.ids(example.messages), chat.encode_answer(text)
        if len(prompt_ids) + len(answer_ids) > context:
            raise DataError(
                f"{example.id} has {len(prompt_ids)} tokens and its right answer {len(answer_ids)}; the model's "
                f"context has {context}: leave the row out"
            )
        tokens = tuple(Token(id=id, text=chat.token(id)[0], logprob=float("nan")) for id in answer_ids)
        completion = Completion(
            prompt_ids=prompt_ids, tokens=tokens, text=text, finish_reason="stop", mixture=Mixture.base()
        )
        rollouts.append(Rollout(example=example, completion=completion, grade=Grade(reward=1.0, right=True)))
    return rollouts
