"""An expert goes to the hub and comes back as it was; what is no sound expert does not; and nobody sees the token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import TOKEN, Hub, running
from huggingface_hub import constants

from t2ray.cli.main import main
from t2ray.core import ConfigError
from t2ray.experts.hub import HubPlace
from t2ray.experts.registry import SHIPPED, Registry

# huggingface_hub 2.4 sends a large file to its HTTP client in a way that httpx2 calls an old one.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in is the hub of this process, which has a token for it and its own working folder."""
    with running() as hub:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub


def push(*more: str) -> int:
    return main(["experts", "push", "math", "hf://me/math", "--experts", str(SHIPPED), "--base", "tiny", *more])


def pull(*more: str) -> int:
    return main(["experts", "pull", "hf://me/math", "--model", "tiny", "--experts", "experts", *more])


def test_an_expert_comes_back_from_the_hub_as_it_was_pushed(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push("--private") == 0 and hub.private == {"me/math": True}
    sha, files = hub.head("me/math")
    assert set(files) == {"expert.safetensors", "manifest.json", "README.md"}
    assert pull() == pull("--name", "sums") == 0
    ours, theirs = Registry(SHIPPED).load("math"), Registry("experts").load("sums")
    assert ours.z.keys() == theirs.z.keys() and all(torch.equal(ours.z[name], theirs.z[name]) for name in ours.z)
    assert (ours.manifest.digest, ours.manifest.metrics) == (theirs.manifest.digest, theirs.manifest.metrics)
    assert Registry("experts").names() == ("math", "sums")
    card = files["README.md"].decode()
    assert 'base_model: "tiny"' in card and f"`{ours.manifest.digest}`" in card and "99.5 %" in card
    assert push() == 0, "pushed again, nothing is new"
    assert pull("--name=old") == 0 and pull() == 0
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err and sha in shown.out
    assert {auth for _, path, auth in hub.asked if path.startswith("/api/repos")} == {f"Bearer {TOKEN}"}


def test_a_revision_is_pulled_as_it_was(hub: Hub) -> None:
    push()
    sha, files = hub.head("me/math")
    hub.commit("me/math", {"expert.safetensors": b"", "manifest.json": b"{}"})
    assert pull() == 2
    assert main(["experts", "pull", f"hf://me/math@{sha}", "--model", "tiny", "--experts", "experts"]) == 0
    assert Registry("experts").names() == ("math",)


def damaged(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    manifest = json.loads(files["manifest.json"]) | changes
    return files | {"manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "ab" * 16}, "its numbers are not those of its manifest's digest"),
        ({"digest": None}, "has no digest in its manifest.json"),
        ({"base_digest": "ab" * 16}, "belongs to another base model"),
        ({"name": "../x"}, "cannot be this"),
        ({"targets": [["model.layers.0.self_attn.q_proj", 3]]}, "is damaged"),
    ],
)
def test_an_expert_that_is_not_sound_is_not_pulled(
    hub: Hub, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    push()
    hub.commit("me/math", damaged(hub.head("me/math")[1], **changes))
    capsys.readouterr()
    assert pull() == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert not Path("experts").exists() and not Path("runs").exists(), "nothing is decomposed for it"


def test_numbers_that_would_overflow_are_not_pulled(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    expert = Registry(SHIPPED).load("math")
    Registry("big").save("math", {k: z * 1e6 for k, z in expert.z.items()}, base_digest=expert.manifest.base_digest)
    assert main(["experts", "push", "math", "hf://me/math", "--experts", "big", "--base", "tiny"]) == 0
    assert pull() == 2 and "|z| is at most 1000" in capsys.readouterr().err


def test_what_is_larger_than_an_expert_is_not_downloaded(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    push()
    hub.commit("me/math", {"expert.safetensors": bytes(20_000_000), "model.pkl": b"code"})
    capsys.readouterr()
    before = len(hub.asked)
    assert pull() == 2
    assert "expert.safetensors has 20,000,000 bytes; an expert has at most" in capsys.readouterr().err
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked[before:] if "/resolve/" in path}
    assert fetched == {"manifest.json"}


def test_a_repository_without_an_expert_says_so(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.commit("me/math", {"model.safetensors": b"x"})
    assert pull() == 2
    assert "hf://me/math has no manifest.json; name a repository" in capsys.readouterr().err


def test_a_refusal_is_one_line_without_the_token(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for status in (401, 403, 404):
        hub.refuse = status, f"not with Authorization: Bearer {TOKEN}"
        for command in (push, pull):
            assert command() == 2
            line = capsys.readouterr().err
            assert line.startswith("t2ray: hf://me/math: ") and line.count("\n") == 1 and TOKEN not in line


def test_a_hub_that_is_not_there_is_one_line(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert pull() == 2
    line = capsys.readouterr().err
    assert line.startswith("t2ray: hf://me/math: ") and line.count("\n") == 1


@pytest.mark.parametrize("uri", ["math", "hf://math", "hf://a/b/c", "hf://a/..", "hf://a/b@", "https://hub/a/b"])
def test_only_a_repository_of_the_hub_is_a_place(uri: str) -> None:
    with pytest.raises(ConfigError, match="write hf://USER/NAME"):
        HubPlace.parse(uri)
