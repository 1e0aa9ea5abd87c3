"""The one prompt that t2ray itself writes: the question of pass 1, "what kind of request is this?". No torch.

The dispatch strategies (paper section 3.2, a and b), the classification domain and the tiny model's pretraining all
build it here, so that they ask the same question.
"""

from __future__ import annotations

from t2ray.core import Message, user

OTHERS = "others"


def dispatch_prompt(messages: tuple[Message, ...], labels: tuple[str, ...]) -> tuple[Message, ...]:
    """The classification question about a conversation: one user turn that ends with the conversation's last message.

    The labels come first, so that the prompts of all requests share a prefix.
    """
    kinds = ", ".join(labels)
    return user(f"Which kind of request is this: {kinds}? Answer with that one word.\n\n{messages[-1].content}")
