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
    base: str | None,
    mixture: Mixture,
    experts: Sequence[ExpertManifest],
    library: str,
    about: str,
    loading: str,
) -> str:
    """Returns the page.

    Args:
        base: the base model, a hub id or a name, where it is known.
        experts: the manifests of the mixture's experts.
        library: the hub's name of the library that loads the files.
        about: a sentence that says what the files are.
        loading: Python or shell that uses them.
    """
    metadata = ({"base_model": base} if base else {}) | {
        "library_name": library,
        "tags": ["t2ray", "transformer-squared"],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    rows = [_row(expert, mixture) for expert in experts]
    table = "\n".join(
        [
            "| expert | version | weight | training | base accuracy | accuracy | digest |",
            "| --- | ---: | ---: | --- | ---: | ---: | --- |",
            *rows,
        ]
    )
    digests = ", ".join(dict.fromkeys(f"`{expert.base_digest}`" for expert in experts)) or "none"
    methods = ", ".join(dict.fromkeys(f"`{expert.method.method}`" for expert in experts)) or "`svf`"
    return (
        f"---\n{front}\n---\n\n# {title}\n\n{about}\n\n"
        f"- Base model: {f'`{base}`' if base else 'the one'}, of which the digest is {digests}.\n"
        f"- Mixture: `{mixture}`, z' = 1 + sum of weight (z - 1).\n"
        f"- Method: {methods}; `svf` is singular value fine-tuning, W' = U diag(s z) V^T "
        "([arXiv 2501.06252](https://arxiv.org/abs/2501.06252)).\n"
        f"- Made by t2ray {__version__}.\n\n"
        f"{table}\n\n"
        "The accuracies are those of greedy answers to the domain's validation prompts.\n\n"
        f"{loading}\n"
    )


def expert_card(expert: ExpertManifest, base: str | None, loading: str) -> str:
    """Returns the page of an expert by itself.

    Args:
        base: the base model's name, where it is known; its digest is in the manifest.
    """
    return card(
        expert.name, base=shown(base) if base else None, mixture=Mixture.of({expert.name: 1.0}), experts=[expert],
        library="t2ray", about="An expert: a few numbers for each adapted matrix of its base model.", loading=loading,
    )  # fmt: skip


def shown(model: str) -> str:
    """A model's name for others: its hub id, or of another local folder the last part; the rest is this machine's."""
    if cached := re.search(r"models--([^/]+?)--([^/]+)", model):  # the hub's cache
        return f"{cached[1]}/{cached[2]}"
    return Path(model).name if Path(model).is_dir() else model


def _row(expert: ExpertManifest, mixture: Mixture) -> str:
    weight = "/".join(f"{alpha:.3g}" for alpha in dict(mixture.weights).get(expert.name, (0.0,)))
    accuracies = [_accuracy(expert.metrics, key) for key in ("base_accuracy", "accuracy")]
    cells = [expert.name, str(expert.version), weight, _training(expert), *accuracies, f"`{expert.digest or 'none'}`"]
    return f"| {' | '.join(cells)} |"


def _training(expert: ExpertManifest) -> str:
    """How an expert was made, as far as its manifest says."""
    rl = expert.config.get("rl")
    if isinstance(rl, Mapping):
        objective = {"sft": "next-token"}.get(str(rl.get("objective")), "REINFORCE")
        return f"{objective}, {rl.get('steps')} steps of {rl.get('prompts')} prompts"
    origin = expert.config.get("imported_from")
    return f"imported from {origin}" if origin else "not known"


def _accuracy(metrics: Mapping[str, object], key: str) -> str:
    value = metrics.get(key)
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "not measured"
