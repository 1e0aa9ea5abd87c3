"""What a run's figures should make its owner look at: answers that are cut, steps without a signal, a KL that leaps."""

from __future__ import annotations

from t2ray.config.rl import RLConfig
from t2ray.training.metrics import StepMetrics

_MOST = 0.5
_LEAP_NATS, _LEAP_TIMES = 0.2, 3.0


class Alarms:
    """The alarms of a run, each of which is told once, at the first step that gives cause.

    Args:
        limit: what bounds an answer, such as "512 tokens".
    """

    def __init__(self, rl: RLConfig, limit: str) -> None:
        self.rl, self.limit = rl, limit
        self.kl = 0.0
        self.timeouts = 0
        self.told: set[str] = set()

    def of(self, row: StepMetrics) -> list[str]:
        """Returns the new alarms of the next step."""
        self.timeouts += row.timeouts or 0
        causes = {
            "cut": self._cut(row), "signal": self._signal(row), "verifier": self._verifier(row),
            "errors": self._errors(row), "kl": self._leap(row),
        }  # fmt: skip
        new = {kind: line for kind, line in causes.items() if line and kind not in self.told}
        self.told.update(new)
        self.kl = row.kl
        return [f"step {row.step}: {line}" for line in new.values()]

    def _cut(self, row: StepMetrics) -> str | None:
        if (row.cut or 0.0) <= _MOST:
            return None
        return (
            f"{row.cut:.0%} of the answers were cut at {self.limit}, before they ended; raise the domain's max_tokens, "
            "or ask for shorter answers"
        )

    def _signal(self, row: StepMetrics) -> str | None:
        if not row.skipped:
            return None
        if row.reward_mean is None:
            return "the verifier abstained from all answers; such a step leaves z as it is and is counted"
        return (
            "no signal: the rewards do not tell a prompt's answers apart; such a step leaves z as it is and is "
            "counted. Use prompts that the base answers now and then, a finer reward, or more rl.samples"
        )

    def _verifier(self, row: StepMetrics) -> str | None:
        if self.timeouts < 2:
            return None
        return (
            f"the reward function ran out of time for {self.timeouts} answers so far, which scored -1; raise "
            "verify_timeout_s, or make it faster"
        )

    def _errors(self, row: StepMetrics) -> str | None:
        if not row.errors:
            return None
        return f"the reward function failed for {row.errors} answers, which left the batch"

    def _leap(self, row: StepMetrics) -> str | None:
        if row.kl - self.kl <= _LEAP_NATS or row.kl <= _LEAP_TIMES * self.kl:
            return None
        return (
            f"the KL to the base leapt from {self.kl:.3f} to {row.kl:.3f} nats per token within one step; lower rl.lr, "
            f"which is {self.rl.rate(row.numbers or 1):g}"
        )
