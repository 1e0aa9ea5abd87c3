"""API keys: who is asking. Only digests of keys are stored, in files and in memory.

A key has 256 random bits, so that a plain SHA-256 of it can be neither guessed nor reversed. A keys file has one line
per key, `user NAME sha256:HEX` or `admin NAME sha256:HEX`, and `#` comments. Others may read the file, because a digest
gives no access. A file that others may write is refused, because they could add a key of their own. Not here: what a
role may do (`routes.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from t2ray.config.serve import ApiConfig
from t2ray.core import ConfigError, check_name

KeyRole = Literal["user", "admin"]
SHORTEST = 16  # characters of a secret in the environment, which a person may have made up
LINE = re.compile(r"(user|admin)\s+(\S+)\s+sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One API key: `Key(name="ann", role="user", digest=...)`; the name goes into the log."""

    name: str
    role: KeyRole
    digest: bytes = b""


ANYONE = Key(name="anyone", role="admin")


def new_key(name: str, role: KeyRole) -> tuple[str, str]:
    """Returns a new secret, which is not stored, and its line for the keys file.

    Raises:
        ConfigError: `name` is not allowed as a key's name.
    """
    secret = f"t2ray-{secrets.token_urlsafe(32)}"
    return secret, f"{role} {check_name(name, 'key')} sha256:{_digest(secret).hex()}"


class Keys:
    """All keys of an endpoint. Without keys, every request counts as `ANYONE`, an admin.

    Raises:
        ConfigError: two keys have the same name.
    """

    def __init__(self, keys: tuple[Key, ...]) -> None:
        names = [key.name for key in keys]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"two API keys have the name {twice[0]!r}; a name says in the log who asked")
        self._keys = keys

    @classmethod
    def load(cls, config: ApiConfig) -> Keys:
        """Reads the keys from `config.keys_file` and from the environment variable `config.keys_env`.

        Raises:
            ConfigError: the file is missing, malformed or writable by others; a secret is too short or not ASCII; two
                keys have the same name.
        """
        found = [] if config.keys_file is None else list(_from_file(Path(config.keys_file)))
        found += _from_text(os.environ.get(config.keys_env, ""), config.keys_env)
        return cls(tuple(found))

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, authorization: str) -> Key | None:
        """The key that an `Authorization: Bearer KEY` header names, or None if there is no such key.

        The time that it takes does not depend on how similar a wrong key is, nor on which key is right.
        """
        if not self._keys:
            return ANYONE
        scheme, _, secret = authorization.partition(" ")
        digest = _digest(secret.strip())
        hits = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        return hits[0] if hits and scheme.lower() == "bearer" else None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _from_file(path: Path) -> Iterator[Key]:
    if not path.is_file():
        raise ConfigError(f"keys_file: {path} is no file; make a line with `t2ray keys`, or leave keys_file out")
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"keys_file: others may write {path}, and so add a key of their own; chmod go-w {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:  # the line is not shown: it may be a secret in the wrong place
            raise ConfigError(f"{path}:{number}: not a key; write `user NAME sha256:HEX` or `admin NAME sha256:HEX`")
        role, name, digest = match.groups()
        yield Key(
            name=check_name(name, "key"), role="admin" if role == "admin" else "user", digest=bytes.fromhex(digest)
        )


def _from_text(text: str, variable: str) -> Iterator[Key]:
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        role, _, secret = part.partition(":")
        if role not in get_args(KeyRole):
            raise ConfigError(f"{variable}: key {number} begins with no role; write user:SECRET,admin:SECRET")
        if len(secret) < SHORTEST:
            raise ConfigError(
                f"{variable}: key {number} has {len(secret)} characters, fewer than {SHORTEST}, and could be guessed; "
                "make one with `t2ray keys`"
            )
        if not secret.isascii():
            raise ConfigError(f"{variable}: key {number} is not ASCII, which a header must be; see `t2ray keys`")
        yield Key(name=f"env-{number}", role="admin" if role == "admin" else "user", digest=_digest(secret))
