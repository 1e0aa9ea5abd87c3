"""The tiny model's unseen task `pick_more` for Inspect, with t2ray's own test rows."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from t2ray.tasks import builtin


@scorer(metrics=[accuracy(), stderr()])
def same() -> Scorer:
    """Right is what is the right answer letter by letter: Inspect's `exact` and `match` take no heed of brackets."""

    async def score(state: TaskState, target: Target) -> Score:
        said = state.output.completion.strip()
        return Score(value=CORRECT if said == target.text else INCORRECT, answer=said)

    return score


@task
def pick_more() -> Task:
    """100 test rows, each with its one right answer."""
    rows = builtin("pick_more")
    examples = rows.examples("test", 100)
    golds = rows.gold_readings(examples)
    samples = [
        Sample(input=example.messages[-1].text, target=gold or "")
        for example, gold in zip(examples, golds, strict=True)
    ]
    return Task(dataset=samples, solver=generate(), scorer=same())
