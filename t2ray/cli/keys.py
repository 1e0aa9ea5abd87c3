"""`t2ray keys`: makes an API key. The secret is shown once; the file keeps a digest."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2ray.api.keys import new_key
from t2ray.cli.options import Parser
from t2ray.cli.output import console


def add(p: Parser) -> None:
    """Adds the options of the command."""
    p.set_defaults(command=run)
    p.add_argument("name", metavar="NAME", help="The name of whoever gets the key; it appears in the log.")
    p.add_argument(
        "--admin", action="store_true", help="Let the key also upload and delete experts and start adaptations."
    )
    p.add_argument("--file", default="keys.txt", metavar="FILE", help="The file that the key is added to.")


def run(args: argparse.Namespace) -> None:
    """Adds a line to the file of keys, and prints the secret."""
    secret, line = new_key(args.name, "admin" if args.admin else "user")
    path = Path(args.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(line + "\n")
    console.print(f"{secret}\n\nshown this once; its digest is in {path} (`api: {{keys_file: {path}}}`)", markup=False)
