"""The processes of an endpoint and their memory, from Linux' /proc.

Not here: starting and ending them (`private`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def family(root: int) -> dict[int, str]:
    """Returns a process and all its descendants: id -> title, such as `ServeReplica:t2ray:Generator` or `raylet`."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                titles[int(entry.name)] = _title((entry / "cmdline").read_bytes())
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)] = int(stat[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles[pid] for pid in sorted(found) if pid in titles}


def rss(pid: int) -> int | None:
    """Returns the resident bytes of a process; None if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return None


def pss(pid: int | str = "self") -> int:
    """Returns the resident bytes of a process; of a page that n processes share, one nth."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kilobytes = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert kilobytes is not None, rollup
    return int(kilobytes[1]) * 1024


def _title(cmdline: bytes) -> str:
    words = cmdline.decode(errors="replace").replace("\0", " ").split()
    if not words:
        return "?"
    if words[0].startswith("ray::"):
        named = re.search(r"ServeReplica:[\w:-]+", words[0]) or re.match(r"ray::[\w:-]+", words[0])
        return named[0].removeprefix("ray::") if named else words[0]
    names = [Path(word).stem for word in words if word.endswith(".py") or "/ray/core/src/" in word]
    return names[0] if names else Path(words[0]).name
