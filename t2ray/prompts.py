"""The question of pass 1, "what kind of request is this?": the only prompt that t2ray itself writes. No torch.

The dispatch strategies (paper section 3.2, a and b), the classification domain and the tiny model's pretraining all ask
this same question.
"""

from __future__ import annotations

from t2ray.core import Message, user

OTHERS = "others"


def dispatch_prompt(messages: tuple[Message, ...], labels: tuple[str, ...]) -> tuple[Message, ...]:
    """Returns the classification question about a conversation: one user turn that ends with its last message.

    The labels come first, so that the prompts of all requests share a prefix.
    """
    kinds = ", ".join(labels)
    return user(f"Which kind of request is this: {kinds}? Answer with that one word.\n\n{messages[-1].content}")
