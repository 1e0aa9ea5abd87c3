"""Ray at the rim: the only package that imports it. Ray's environment is set here, since Ray reads it on import."""

from __future__ import annotations

import os

for _key, _value in {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a short run must not wait for a poll of 2 s at each of its stages
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",  # nodes that are started on demand take minutes to come
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # every domain stands in the dashboard, under Train
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_worker_killing_policy_by_group": "true",  # on a full machine one worker ends, not all that work there
    # What a dead worker means is said in one line (`faults`); Ray prints a page, whatever `log_to_driver` says.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed|killed due to memory pressure|graceful_shutdown failed"
    "|listen_for_change failed|Raylet is terminated",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",  # three of them; a slow machine's proxy needs more than 15 s
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep at once; it is resumed from its own state
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_key, _value)
