"""The thread that drives vLLM: it alone touches vLLM's engine, step by step, and between two steps does what waits.

With one mixture in the weights, requests of another wait until those that run have ended; then it is folded.
Not here: what callers see (`engine`), and what is done with an output (`answers`).
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from t2ray.core import GenerationError, Mixture
from t2ray.engine.vllm import seams
from t2ray.engine.vllm.bank import ARGUMENT, Mode


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request to vLLM. In the thread, `deliver` gets its outputs, and `fail` what ended it before its end.

    `mixture` names experts by their keys, which are names with versions.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: dict[str, Any]
    mixture: Mixture
    deliver: Callable[[Any], None]
    fail: Callable[[Exception], None]


class Pump:
    """vLLM's engine with its thread."""

    def __init__(self, vllm_config: Any, mode: Mode, processes: bool) -> None:
        self.mode = mode
        self.usage = 0.0
        self.engine = seams.LLMEngine(
            vllm_config, seams.Executor.get_class(vllm_config), log_stats=True, stat_loggers=[self._logger],
            multiprocess_mode=processes,
        )  # fmt: skip
        self.jobs: dict[str, Job] = {}
        self.waiting: deque[Job] = deque()
        self.live: Counter[str] = Counter()
        self.folded, self.lost = Mixture.base(), 0.0
        self.count = Counter({"steps": 0, "rows": 0, "mixtures": 0, "folds": 0})
        self.turned = time.monotonic()
        self.error: Exception | None = None
        self.after_step: Callable[[], None] = lambda: None
        self.ended: Callable[[str], None] = lambda key: None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def runs(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._loop, name="t2ray-vllm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and vLLM's processes; what is still running fails."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self.engine.engine_core.shutdown()

    def soon(self, what: Callable[[], None]) -> None:
        """Does it in the thread, between two steps; here and now where no thread runs yet."""
        if self._thread is None:
            what()
        else:
            self._queue.put(what)

    def call(self, what: Callable[[], Any]) -> Any:
        """As `soon`, and returns its result or raises its error."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(what())
            except Exception as error:  # its caller's; the requests of others go on
                done.set_exception(error)

        self.soon(run)
        while not done.done() and self.runs:
            wait([done], timeout=0.1)
        if not done.done():
            raise GenerationError("the engine has stopped") from self.error
        return done.result()

    def add(self, job: Job) -> None:
        """Takes a request; in the thread."""
        self.live.update(job.mixture.names)
        self.waiting.append(job)

    def abort(self, id: str) -> None:
        """Ends a request; in the thread."""
        for job in [job for job in self.waiting if job.id == id]:
            self.waiting.remove(job)
            self._forget(job)
        if (running := self.jobs.pop(id, None)) is not None:
            self.engine.abort_request([id])
            self._forget(running)

    # ------------------------------------------------------------------------------------------------------- the thread

    def _loop(self) -> None:
        try:
            while self._turn():
                pass
            self._fail_all(GenerationError("the engine has stopped"))
        except Exception as error:  # vLLM's; everybody is told, and `check` raises it
            self.error = error
            self._fail_all(GenerationError(f"the engine failed: {error}"))

    def _turn(self) -> bool:
        """What waits, then a step where there is something to do; False at the end."""
        self.turned = time.monotonic()
        while True:
            try:
                what = self._queue.get(block=not self.jobs, timeout=0.1)
            except queue.Empty:
                break
            if what is None:
                return False
            what()
            self._admit()
        self._admit()
        if self.jobs:
            self._step()
        return True

    def _step(self) -> None:
        outputs = self.engine.step()
        self.count["steps"] += 1
        there = [(job, output) for output in outputs if (job := self.jobs.get(output.request_id)) is not None]
        self.count["rows"], self.count["mixtures"] = len(there), len({job.mixture for job, _ in there})
        for job, output in there:
            job.deliver(output)
            if output.finished and self.jobs.pop(job.id, None) is not None:
                self._forget(job)
        self.after_step()

    def _admit(self) -> None:
        while self.waiting:
            if self.mode == "one" and self.waiting[0].mixture != self.folded:
                if self.jobs:
                    return
                self._fold(self.waiting[0].mixture)
                same = [job for job in self.waiting if job.mixture == self.folded]
                self.waiting = deque([*same, *(job for job in self.waiting if job.mixture != self.folded)])
            job = self.waiting.popleft()
            self.jobs[job.id] = job
            if self.mode == "mixtures" and job.mixture.weights:
                job.params["extra_args"] = {ARGUMENT: [[key, list(alpha)] for key, alpha in job.mixture.weights]}
            try:
                prompt = seams.TokensPrompt(prompt_token_ids=list(job.prompt_ids), cache_salt=_salt(job.mixture))
                self.engine.add_request(job.id, prompt, seams.SamplingParams(**job.params))
            except (
                ValueError,
                seams.VLLMClientError,
            ) as error:  # vLLM refuses it: it is this caller's error, and the others go on
                del self.jobs[job.id]
                self._forget(job)
                job.fail(GenerationError(f"vLLM refuses the request: {error}"))
                self.after_step()

    def _fold(self, mixture: Mixture) -> None:
        pairs = [[key, list(alpha)] for key, alpha in mixture.weights]
        self.lost = max(self.engine.collective_rpc("t2ray_fold", args=(pairs,)))
        self.engine.reset_prefix_cache()
        self.folded = mixture
        self.count["folds"] += bool(mixture.weights)

    def _forget(self, job: Job) -> None:
        self.live.subtract(job.mixture.names)
        for key in job.mixture.names:
            if not self.live[key]:
                del self.live[key]
                self.ended(key)

    def _fail_all(self, error: Exception) -> None:
        for job in [*self.jobs.values(), *self.waiting]:
            job.fail(error)
        self.jobs.clear()
        self.waiting.clear()
        self.after_step()

    def _logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        pump = self

        class Usage(seams.StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, *others: object, **more: object) -> None:
                if scheduler_stats is not None:
                    pump.usage = float(scheduler_stats.kv_cache_usage)

            def log_engine_initialized(self) -> None:
                pass

        return Usage()


def _salt(mixture: Mixture) -> str:
    """What keeps keys and values of one mixture, experts' versions included, from requests of another."""
    return hashlib.blake2b(repr(mixture.weights).encode(), digest_size=16).hexdigest()
