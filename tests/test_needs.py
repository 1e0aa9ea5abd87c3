"""What was skipped is counted by what it needs."""

from __future__ import annotations

import needs


def test_skips_are_counted_by_what_they_need_the_most_frequent_first() -> None:
    assert needs.counted([needs.CUDA, needs.CHROMIUM, "not today", needs.CHROMIUM, "not today", "not today"]) == [
        "skipped: 3 tests: not today",
        "skipped: 2 tests need chromium (apt-get install chromium)",
        "skipped: 1 test needs a CUDA device (a machine with an NVIDIA GPU and a torch for it)",
    ]
    assert needs.counted([]) == []
