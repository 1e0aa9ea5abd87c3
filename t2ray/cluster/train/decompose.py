"""Decomposes a model in Ray tasks, one per matrix; the folder must be one that every node sees.

Not here: how a matrix is decomposed or what is skipped (`adapters.factors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from t2ray.adapters.factors import Decomposition, Factors, Float, ShowProgress, Stored, Target, prepare
from t2ray.cluster.session import cancel, check_shared, session
from t2ray.core import T2RayError


def _run(job: Decomposition, target: Target) -> str:
    job.run(target)
    return target.name


def decompose_on_ray(
    model: str,
    out: str | Path,
    *,
    workers: int,
    targets: Sequence[str] | None = None,
    layers: str | None = None,
    svd_dtype: Float = "float32",
    dtype: Stored | None = None,
    progress: ShowProgress | None = None,
) -> Factors:
    """Does what `factors.decompose` does, with at most `workers` matrices at once; each takes a CPU and its memory.

    Ray is started on this machine, and stopped again, where no cluster is connected and RAY_ADDRESS names none.
    Raises as `factors.decompose` does, and as `session` and `check_shared` do; a matrix that fails cancels those under
    way, and finished ones stay.
    """
    with session():
        check_shared([str(Path(out).expanduser().absolute())])
        job = prepare(model, out, targets=targets, layers=layers, svd_dtype=svd_dtype, dtype=dtype)
        missing, total = job.missing(), len(job.plan.targets)
        if missing:
            _share_out(job, missing, workers, progress, total)
    return job.finish()


def _share_out(
    job: Decomposition, missing: Sequence[Target], workers: int, progress: ShowProgress | None, total: int
) -> None:
    run, shared, waiting = ray.remote(num_cpus=1)(_run), ray.put(job), list(reversed(missing))
    under_way: list[ray.ObjectRef] = []
    done = total - len(missing)
    try:
        while waiting or under_way:
            # No more tasks than workers exist at once: a wider cluster would otherwise start one on every CPU.
            while waiting and len(under_way) < workers:
                under_way.append(run.remote(shared, waiting.pop()))
            finished, under_way = ray.wait(under_way)
            for name in ray.get(finished):
                done += 1
                if progress is not None:
                    progress(done, total, name)
    except RayTaskError as error:
        if isinstance(error.cause, T2RayError):
            raise error.cause from None
        raise
    finally:
        cancel(under_way)
