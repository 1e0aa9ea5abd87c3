"""The question of pass 1, "what kind of request is this?": the only prompt that t2ray itself writes. No torch.

The dispatch strategies (paper section 3.2, a and b), the classification domain and the tiny model's pretraining all ask
this same question.
"""

from __future__ import annotations

from t2ray.core import Message, Prompt, user

OTHERS = "others"
SHORT = 20
"""A turn of fewer characters may be a follow-up, such as "and of 7?", that has a meaning only after another turn."""


def pictured(prompt: Prompt) -> tuple[Message, ...]:
    """Returns a conversation with pictures as it is; nothing of any other prompt."""
    messages = () if isinstance(prompt, str) else tuple(part for part in prompt if isinstance(part, Message))
    return messages if any(message.images for message in messages) else ()


def requests(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Returns the turns that pass 1 may read of a conversation, in the order in which it reads them.

    They are the last turn of the user's and, as long as the text before is `SHORT`, the one before it; one with
    pictures first by its words, if it has any. What the system and the assistant say is no request; a conversation
    without a user's turn is read by its last message.
    """
    turns = [message for message in reversed(messages) if message.role == "user"] or [messages[-1]]
    short = next((i for i, turn in enumerate(turns) if len(turn.text) >= SHORT), len(turns))
    found = list[Message]()
    for turn in turns[: short + 1]:
        found += user(turn.text) if turn.text.strip() or not turn.images else ()
        found += user((*turn.images, turn.text)) if turn.images else ()
    return tuple(found)


def dispatch_prompt(messages: tuple[Message, ...], labels: tuple[str, ...]) -> tuple[Message, ...]:
    """Returns the classification question about a conversation: one user turn that ends with the user's last turn."""
    return question(requests(messages)[0], labels)


def question(turn: Message, labels: tuple[str, ...]) -> tuple[Message, ...]:
    """Returns the classification question about a turn.

    The labels come first, so that the prompts of all requests share a prefix.
    """
    asked = f"Which kind of request is this: {', '.join(labels)}? Answer with that one word.\n\n"
    return user((asked, *turn.images, turn.text) if turn.images else asked + turn.text)
