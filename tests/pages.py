"""The blocks of a page, and a reader who pastes them one after the other into an empty folder.

A block of YAML, JSON lines or Python is written to the file that the text before it names (`larger.yaml`, beside it:);
a block of Python without a name is run, as every block of shell commands is. `t2ray serve` goes on in the background,
and the port 8000 is one that is free.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from endpoint import free_port
from waiting import GUARD_S, family, lives, wait_until

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`([\w.-]+\.(py|yaml|jsonl))`")
_SUFFIX = {"python": "py", "yaml": "yaml", "jsonl": "jsonl"}
SHELL = "bash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`Block(language="yaml", text="model: tiny\\n...", file="larger.yaml", line=87)`; no file: it is to be run."""

    language: str
    text: str
    file: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that name a language, in order; `text` is what a command prints, and is none."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        language, body = match.groups()
        if language == "text":
            continue
        paragraph = text[: match.start()].rstrip().rpartition("\n\n")[2]
        names = [name for name, suffix in _NAME.findall(paragraph) if suffix == _SUFFIX.get(language)]
        file = names[-1] if names and paragraph.endswith(":") else None
        found.append(Block(language=language, text=body, file=file, line=text[: match.start()].count("\n") + 1))
    return found


def commands(block: Block) -> list[str]:
    """A shell block's lines; a command that goes on after a backslash is one of them."""
    return re.sub(r"\\\n\s*", "", block.text).splitlines()


@dataclass(slots=True, kw_only=True)
class Reader:
    """Does what a page says, in `folder`; `environment` is one in which `t2ray` is the installed package."""

    folder: Path
    environment: Mapping[str, str]
    port: int = field(default_factory=free_port)
    _servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            started = family(server.pid)
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(GUARD_S)
            finally:
                server.kill()
            wait_until(lambda started=started: not any(map(lives, started)), "the end of a server's processes")

    def follow(self, block: Block, exempt: tuple[str, ...] = ()) -> str:
        """Writes the block's file or runs it, without the commands that begin as one of `exempt`; what it printed.

        Raises:
            AssertionError: it failed.
        """
        text = block.text.replace("8000", str(self.port))
        if block.file is not None:
            (self.folder / block.file).write_text(text, encoding="utf-8")
            return ""
        if block.language == "python":
            return self._run([sys.executable, "-c", text], block)
        assert block.language == SHELL, f"line {block.line}: a block of {block.language} is neither named nor run"
        kept = [line for line in commands(block) if not line.startswith(exempt)]
        if [line.partition("#")[0].strip() for line in kept] == ["t2ray serve"]:
            return self._serve()
        return self._run(["bash", "-euo", "pipefail", "-c", "\n".join(kept).replace("8000", str(self.port))], block)

    def _run(self, command: list[str], block: Block) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=12 * GUARD_S,
        )
        assert done.returncode == 0, f"the block at line {block.line} failed:\n{block.text}\n{done.stdout}"
        return done.stdout

    def _serve(self) -> str:
        log = self.folder / f"serve-{len(self._servers)}.log"
        with log.open("w") as file:
            server = subprocess.Popen(
                ["t2ray", "serve", "--port", str(self.port)],
                cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        self._servers.append(server)
        wait_until(lambda: server.poll() is not None or "serving on" in log.read_text(), "an endpoint")
        assert server.poll() is None, log.read_text()
        return log.read_text()
