"""Asks a t2ray endpoint through the openai package, and prints each answer with the experts that gave it.

python client.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

QUESTIONS = [
    ("t2ray", "17+25"),  # the endpoint finds the experts by itself
    ("t2ray", "add 3 to n"),
    ("t2ray:math", "17+25"),  # this expert
    ("t2ray:math:0.7,code:0.3", "17+25"),  # this mixture
    ("t2ray:base", "17+25"),  # none
]


def main(url: str) -> None:
    client = OpenAI(base_url=url, api_key="none")
    for model, question in QUESTIONS:
        answer = client.chat.completions.create(
            model=model, temperature=0, messages=[{"role": "user", "content": question}]
        )
        mixture = answer.model_extra["t2ray"]["mixture"]
        heaviest = sorted(mixture.items(), key=lambda pair: -pair[1])
        experts = ", ".join(f"{name} {weight:g}" for name, weight in heaviest) or "no expert"
        print(f"{model:24} {question:12} {answer.choices[0].message.content:14} {experts}")


if __name__ == "__main__":
    main(sys.argv[1])
