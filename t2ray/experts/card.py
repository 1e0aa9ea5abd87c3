"""The page of an exported or pushed expert, as the Hugging Face hub shows it: `README.md`, with its metadata on top.

It says what the weights are, which experts are in them with their digests and accuracies, and how they are loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from t2ray.core import Mixture, __version__
from t2ray.experts.manifest import ExpertManifest

CARD = "README.md"


def card(
    title: str,
    *,
    base: str,
    mixture: Mixture,
    experts: Sequence[ExpertManifest],
    library: str,
    about: str,
    loading: str,
) -> str:
    """Returns the page.

    Args:
        base: the base model, a hub id or a name.
        experts: the manifests of the mixture's experts.
        library: the hub's name of the library that loads the files.
        about: a sentence that says what the files are.
        loading: Python or shell that uses them.
    """
    metadata = {"base_model": base, "library_name": library, "tags": ["t2ray", "transformer-squared", "svf"]}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    rows = [_row(expert, mixture) for expert in experts]
    table = "\n".join(
        [
            "| expert | version | weight | method | base accuracy | accuracy | digest |",
            "| --- | ---: | ---: | --- | ---: | ---: | --- |",
            *rows,
        ]
    )
    digests = ", ".join(dict.fromkeys(f"`{expert.base_digest}`" for expert in experts)) or "none"
    return (
        f"---\n{front}\n---\n\n# {title}\n\n{about}\n\n"
        f"- Base model: `{base}`, of which the digest is {digests}.\n"
        f"- Mixture: `{mixture}`, z' = 1 + sum of weight (z - 1).\n"
        "- Method: singular value fine-tuning, W' = U diag(s z) V^T "
        "([arXiv 2501.06252](https://arxiv.org/abs/2501.06252)).\n"
        f"- Made by t2ray {__version__}.\n\n"
        f"{table}\n\n"
        "The accuracies are those of greedy answers to the domain's validation prompts.\n\n"
        f"{loading}\n"
    )


def shown(model: str) -> str:
    """A model's name for others: its hub id, or of another local folder the last part; the rest is this machine's."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)", model):  # the hub's cache
        return f"{cached[1]}/{cached[2]}"
    return Path(model).name if Path(model).is_dir() else model


def _row(expert: ExpertManifest, mixture: Mixture) -> str:
    weight = "/".join(f"{alpha:.3g}" for alpha in dict(mixture.weights).get(expert.name, (0.0,)))
    accuracies = [_accuracy(expert.metrics, key) for key in ("base_accuracy", "accuracy")]
    cells = [expert.name, str(expert.version), weight, _method(expert), *accuracies, f"`{expert.digest or 'none'}`"]
    return f"| {' | '.join(cells)} |"


def _method(expert: ExpertManifest) -> str:
    """How an expert was made, as far as its manifest says."""
    rl = expert.config.get("rl")
    if isinstance(rl, Mapping):
        return f"REINFORCE, {rl.get('steps')} steps of {rl.get('prompts')} prompts"
    origin = expert.config.get("imported_from")
    return f"imported from {origin}" if origin else "not known"


def _accuracy(metrics: Mapping[str, object], key: str) -> str:
    value = metrics.get(key)
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "not measured"
