"""`t2ray keys`: makes an API key. The secret is shown once; the file keeps a digest."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2ray.api.keys import new_key
from t2ray.cli.output import console


def keys(args: argparse.Namespace) -> None:
    """Adds a line to the keys file, and prints the secret."""
    secret, line = new_key(args.name, "admin" if args.admin else "user")
    path = Path(args.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(line + "\n")
    console.print(f"{secret}\n\nshown this once; its digest is in {path} (`api: {{keys_file: {path}}}`)", markup=False)
