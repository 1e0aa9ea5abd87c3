"""The registry keeps every version whole, refuses what does not fit, and takes experts in and gives them out."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from t2ray.adapters.factors import Factors, Manifest, Target, decompose_matrix
from t2ray.cli.main import main
from t2ray.core import ConfigError, ExpertError, Mixture, UnknownExpert
from t2ray.experts.exchange import export_expert, histogram, import_expert
from t2ray.experts.follow import Follower
from t2ray.experts.heatmap import HeatMap, mean_distance, mean_shift
from t2ray.experts.registry import SHIPPED, Expert, Registry
from t2ray.store import Store

BASE = "ab" * 16
LAYOUT = (
    Target(name="model.layers.0.self_attn.q_proj", layer=0, m=6, n=4, rank=4),
    Target(name="model.layers.0.mlp.up_proj", layer=0, m=3, n=8, rank=3),
    Target(name="model.layers.1.mlp.up_proj", layer=1, m=3, n=8, rank=3),
)


def vectors(seed: int = 0, targets: tuple[Target, ...] = LAYOUT) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {target.name: 1 + 0.1 * torch.randn(target.rank, generator=generator) for target in targets}


def equal(expert: Expert, z: dict[str, torch.Tensor]) -> bool:
    return expert.z.keys() == z.keys() and all(torch.equal(expert.z[name], z[name]) for name in z)


@pytest.fixture(params=["local", "object store"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "experts")
    if request.param == "object store":
        registry.store = Store("bucket/experts", fs._MockFileSystem())
    return registry


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "experts")


# ------------------------------------------------------------------------------------------------------------ registry


def test_an_expert_is_loaded_as_it_was_saved(registry: Registry) -> None:
    z = vectors()
    version = registry.save(
        "math",
        z,
        base_digest=BASE,
        domain="math",
        config={"lr": 0.02},
        metrics={"accuracy": 0.9},
        seed=7,
        rescaled=True,
    )
    expert = registry.load("math", base_digest=BASE, layout=LAYOUT)
    assert (expert.name, expert.version, version) == ("math", 1, 1)
    assert equal(expert, z)
    kept = expert.manifest
    assert (kept.domain, kept.config, kept.metrics, kept.seed) == ("math", {"lr": 0.02}, {"accuracy": 0.9}, 7)
    assert kept.rescaled and kept.parametrisation == "scale" and kept.base_digest == BASE
    assert kept.targets == tuple((target.name, target.rank) for target in LAYOUT)


def test_versions_rise_and_the_latest_is_loaded(registry: Registry) -> None:
    for seed in range(3):
        assert registry.save("math", vectors(seed), base_digest=BASE) == seed + 1
    assert registry.versions("math") == (1, 2, 3)
    assert equal(registry.load("math"), vectors(2))
    assert equal(registry.load("math", 1), vectors(0))
    assert [(m.name, m.version) for m in registry.list()] == [("math", 3)]


def test_adding_an_expert_changes_no_file_of_another(local: Registry, tmp_path: Path) -> None:
    local.save("math", vectors(), base_digest=BASE)
    before = {path: path.read_bytes() for path in (tmp_path / "experts").rglob("*") if path.is_file()}
    local.save("code", vectors(1), base_digest=BASE)
    local.save("math", vectors(2), base_digest=BASE)
    assert before == {path: path.read_bytes() for path in before}
    assert equal(local.load("math", 1), vectors())


def test_a_version_without_manifest_does_not_exist_and_its_number_is_not_used_again(registry: Registry) -> None:
    registry.save("math", vectors(), base_digest=BASE)
    registry.store.write_text("math/v0002/expert.safetensors", "half")
    registry.store.write_text("draft/v0001/expert.safetensors", "half")
    assert registry.names() == ("math",)
    assert registry.load("math").version == 1
    assert registry.save("math", vectors(), base_digest=BASE) == 3


def test_writers_at_once_each_get_a_version_of_their_own(registry: Registry) -> None:
    versions: dict[int, int] = {}

    def save(seed: int) -> None:
        versions[seed] = registry.save("math", vectors(seed), base_digest=BASE)

    threads = [threading.Thread(target=save, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions.values()) == list(registry.versions("math")) and len(versions) == 6
    for seed, version in versions.items():
        assert equal(registry.load("math", version), vectors(seed))


def test_saving_leaves_the_seeded_generators_alone(local: Registry) -> None:
    import random

    random.seed(0)
    expected = random.Random(0).random()
    local.save("math", vectors(), base_digest=BASE)
    assert random.random() == expected


def test_deleting_takes_a_version_or_all(registry: Registry) -> None:
    for seed in range(2):
        registry.save("math", vectors(seed), base_digest=BASE)
    registry.save("code", vectors(), base_digest=BASE)
    registry.delete("math", 2)
    assert registry.versions("math") == (1,)
    registry.delete("math")
    assert registry.names() == ("code",)
    with pytest.raises(UnknownExpert):
        registry.delete("math")


def test_what_is_damaged_is_listed_and_can_be_deleted(
    local: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("math", "code", "pick", "sound"):
        local.save(name, vectors(), base_digest=BASE)
    local.save_mixture("sums", Mixture.of({"math": 1.0}))
    manifests = {name: tmp_path / f"experts/{name}/v0001/manifest.json" for name in ("math", "code", "pick")}
    manifests["math"].write_text("{")
    manifests["code"].write_bytes(b"\xff\x00")
    manifests["pick"].unlink()
    manifests["pick"].mkdir()
    (tmp_path / "experts/_mixtures/sums.json").write_text("{")
    of = ["--experts", str(tmp_path / "experts")]
    assert main(["experts", "list", *of]) == 0
    told = capsys.readouterr().out
    assert "\nsound " in told and all(f"{name}/v0001/manifest.json is no" in told for name in ("math", "code"))
    assert "sums.json is no mixture" in told
    for name in (*manifests, "fewshot/sums"):
        assert main(["experts", "delete", name, *of]) == 0
    assert local.names() == ("sound",) and local.mixtures() == ()
    assert not any((tmp_path / "experts" / name).exists() for name in manifests)


def test_an_unknown_expert_is_named_with_its_nearest(registry: Registry) -> None:
    with pytest.raises(UnknownExpert, match="'math'.*known: none"):
        registry.load("math")
    for name in ("math", "code"):
        registry.save(name, vectors(), base_digest=BASE)
    with pytest.raises(UnknownExpert, match="'mth'.*did you mean 'math'.*code, math"):
        registry.load("mth")
    with pytest.raises(UnknownExpert, match="no version 9; it has 1"):
        registry.load("math", 9)


@pytest.mark.parametrize("name", ["../math", "Math", "", "a/b", "_mixtures", "x" * 64, ".hidden"])
def test_a_name_that_is_no_folder_name_is_refused(name: str, local: Registry, tmp_path: Path) -> None:
    for use in (lambda: local.save(name, vectors(), base_digest=BASE), lambda: local.load(name)):
        with pytest.raises(ConfigError, match=re.escape(repr(name))):
            use()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what does not fit


def test_an_expert_of_another_base_is_refused_with_both_digests(local: Registry) -> None:
    local.save("math", vectors(), base_digest=BASE)
    with pytest.raises(ExpertError, match=f"belongs to another base model.*{BASE}.*{'cd' * 16}"):
        local.load("math", base_digest="cd" * 16)


def test_targets_and_shapes_that_the_factors_lack_are_refused(local: Registry) -> None:
    local.save("math", vectors(), base_digest=BASE)
    with pytest.raises(ExpertError, match=r"adapts model\.layers\.1\.mlp\.up_proj, which the factors lack"):
        local.load("math", layout=LAYOUT[:2])
    other = (Target(name=LAYOUT[0].name, layer=0, m=6, n=5, rank=5), *LAYOUT[1:])
    with pytest.raises(ExpertError, match=r"4 numbers for model\.layers\.0\.self_attn\.q_proj, whose factors have 5"):
        local.load("math", layout=other)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("truncated", "damaged: .*cannot be read"),
        ("missing", "damaged: .*cannot be read"),
        ("folder", "damaged: .*it is a folder"),
        ("shape", r"damaged: model\.layers\.0\.mlp\.up_proj has the shape \(2,\), not \(3,\)"),
        ("absent", r"damaged: model\.layers\.0\.mlp\.up_proj has the shape None"),
        ("nan", r"not finite, in model\.layers\.0\.mlp\.up_proj"),
    ],
)
def test_damaged_tensors_are_refused(damage: str, says: str, local: Registry, tmp_path: Path) -> None:
    z = vectors()
    local.save("math", z, base_digest=BASE)
    path, name = tmp_path / "experts/math/v0001/expert.safetensors", LAYOUT[1].name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        z[name] = torch.ones(2) if damage == "shape" else torch.full((3,), float("nan"))
        save_file({key: value for key, value in z.items() if (damage, key) != ("absent", name)}, path)
    with pytest.raises(ExpertError, match=says):
        local.load("math")


@pytest.mark.parametrize("damage", ["flipped", "another expert's", "another version's"])
def test_tensors_that_are_not_the_manifests_are_refused_at_every_load(
    damage: str, local: Registry, factors: Factors, tmp_path: Path
) -> None:
    base = factors.base_digest
    local.save("math", vectors(2), base_digest=base)
    local.save("math", vectors(0), base_digest=base)
    local.save("code", vectors(1), base_digest=base)
    export_expert(local.load("math"), tmp_path / "handed on")
    follower = Follower(local, base, LAYOUT, lambda z: torch.cat(list(z.values())))
    paths = [tmp_path / "experts/math/v0002/expert.safetensors", tmp_path / "handed on/expert.safetensors"]
    for path in paths:
        other = {"another expert's": "code/v0001", "another version's": "math/v0001"}.get(damage)
        data = bytearray((tmp_path / f"experts/{other}/expert.safetensors" if other else path).read_bytes())
        data[-1] ^= 0 if other else 1
        path.write_bytes(data)
    says = "damaged: its numbers are not those of its manifest's digest"
    with pytest.raises(ExpertError, match=says):
        local.load("math", layout=LAYOUT)
    with pytest.raises(ExpertError, match=says):
        import_expert(local, "theirs", tmp_path / "handed on", factors)
    follower.sync()
    assert says in follower.snapshot.problems["math"] and list(follower.snapshot.tensors) == ["code"]


def test_an_expert_without_a_digest_is_loaded_and_shown_as_unverified(
    local: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local.save("math", vectors(), base_digest=BASE)
    show = ["experts", "show", "math", "--experts", str(tmp_path / "experts")]
    assert main(show) == 0
    digest = local.manifest("math").digest
    assert digest is not None and f"{digest}\n" in capsys.readouterr().out
    manifest = json.loads(local.store.read_text("math/v0001/manifest.json"))
    del manifest["digest"]
    local.store.write_text("math/v0001/manifest.json", json.dumps(manifest))
    assert equal(local.load("math"), vectors())
    assert main(show) == 0
    assert re.search(r"^digest +unverified$", capsys.readouterr().out, re.MULTILINE)


def test_the_shipped_experts_have_digests() -> None:
    registry = Registry(SHIPPED)
    assert all(registry.load(name).manifest.digest for name in registry.names())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"parametrisation": "sigmoid"}, "parametrisation"),
        ({"colour": "red"}, "colour"),
        ({"base_digest": None}, "base_digest"),
    ],
)
def test_a_manifest_of_another_schema_is_refused(change: dict[str, object], says: str, local: Registry) -> None:
    local.save("math", vectors(), base_digest=BASE)
    manifest = json.loads(local.store.read_text("math/v0001/manifest.json"))
    local.store.write_text("math/v0001/manifest.json", json.dumps(manifest | change))
    with pytest.raises(ExpertError, match=says):
        local.load("math")


@pytest.mark.parametrize("z", [{}, {"a": torch.ones(2, 2)}, {"a": torch.tensor([1.0, float("inf")])}])
def test_what_could_not_be_loaded_is_not_saved(z: dict[str, torch.Tensor], local: Registry, tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="not saved"):
        local.save("math", z, base_digest=BASE)
    assert not (tmp_path / "experts").exists()


FULL_DISK = """
import resource, sys, torch
from t2ray.core import ResourceError
from t2ray.experts.registry import Registry
registry = Registry(sys.argv[1])
registry.save("math", {"a": torch.ones(4)}, base_digest="0")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    registry.save("math", {"a": torch.ones(5000)}, base_digest="0")
except ResourceError as error:
    print(error)
"""


def test_a_save_that_finds_no_room_leaves_no_version(tmp_path: Path) -> None:
    """A limit on file sizes fails a write half-way, as a full disk does."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    assert "free some space" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert os.listdir(tmp_path / "math") == ["v0001"]
    assert torch.equal(Registry(tmp_path).load("math").z["a"], torch.ones(4))


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_a_mixture_is_kept_by_name_and_is_no_expert(registry: Registry) -> None:
    mixture = Mixture.of({"math": [0.25, 0.1], "code": 0.5})
    registry.save_mixture("long-math", Mixture.base())
    registry.save_mixture("long-math", mixture, {"accuracy": 0.9})
    assert registry.load_mixture("long-math") == mixture
    assert registry.mixture_record("long-math").meta == {"accuracy": 0.9}
    assert registry.mixtures() == ("long-math",)
    assert registry.names() == ()
    with pytest.raises(UnknownExpert, match="no mixture 'long-mth'.*did you mean 'long-math'"):
        registry.load_mixture("long-mth")
    registry.store.write_text("_mixtures/bad.json", "{}")
    with pytest.raises(ExpertError, match=r"bad\.json is no mixture"):
        registry.load_mixture("bad")


# ------------------------------------------------------------------------------------------------------------ exchange


@pytest.fixture
def factors(tmp_path: Path) -> Factors:
    """Of three matrices that no model has together."""
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "factors"
    for target in LAYOUT:
        w_MN = torch.randn(target.m, target.n, generator=generator)
        tensors = dict(zip(("U", "s", "Vh"), decompose_matrix(w_MN)[:3], strict=True))
        Store(folder).write_tensors(f"{target.name}.safetensors", tensors, {})
    manifest = Manifest(
        base_digest="ef" * 16, svd_dtype="float32", dtype="float32", targets=LAYOUT, model="model",
        errors={target.name: (0.0, 0.0) for target in LAYOUT},
    )  # fmt: skip
    return Factors(folder, manifest)


def test_an_exported_expert_is_imported_unchanged(local: Registry, factors: Factors, tmp_path: Path) -> None:
    local.save("math", vectors(), base_digest=factors.base_digest, domain="math", metrics={"accuracy": 0.9}, seed=7)
    export_expert(local.load("math"), tmp_path / "handed on")
    assert import_expert(local, "theirs", tmp_path / "handed on", factors) == 1
    theirs = local.load("theirs", base_digest=factors.base_digest, layout=factors.layout)
    assert equal(theirs, vectors())
    assert (theirs.manifest.domain, theirs.manifest.metrics, theirs.manifest.seed) == ("math", {"accuracy": 0.9}, 7)
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_expert(local.load("math"), tmp_path / "handed on")


def test_an_exported_expert_of_another_base_is_refused(local: Registry, factors: Factors, tmp_path: Path) -> None:
    local.save("math", vectors(), base_digest=BASE)
    export_expert(local.load("math"), tmp_path / "x")
    with pytest.raises(ExpertError, match="another base model"):
        import_expert(local, "theirs", tmp_path / "x", factors)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda z: {f"t{i}": torch.ones(1) for i in range(10_000)}, "10,000 tensors; the factors have 3 targets"),
        (lambda z: z | {"lm_head": torch.ones(3)}, r"4 tensors; the factors have 3"),
        (lambda z: {"lm_head": torch.ones(3)}, "'lm_head' is no target"),
        (lambda z: z | {LAYOUT[0].name: torch.ones(5_000_000)}, r"\(5000000,\); its factors need \(4,\)"),
        (lambda z: z | {LAYOUT[1].name: torch.ones(3, dtype=torch.int64)}, "holds I64; an expert's numbers are one of"),
        (lambda z: z | {LAYOUT[1].name: torch.ones(3, dtype=torch.float8_e4m3fn)}, "holds F8_E4M3;"),
        (lambda z: z | {LAYOUT[1].name: torch.full((3,), -2e3)}, r"value 2e\+03; \|z\| is at most 1000"),
    ],
)
def test_a_file_that_is_no_expert_is_refused(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    says: str, local: Registry, factors: Factors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By its header, where that says enough: nothing reads its tensors then."""
    save_file(change(vectors()), tmp_path / "z.safetensors")
    if "value" not in says:
        monkeypatch.setattr(Store, "read_tensors", None)
    with pytest.raises(ExpertError, match=says):
        import_expert(local, "math", tmp_path / "z.safetensors", factors)
    assert local.names() == ()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "its header has 0 bytes"),
        (lambda data: b"\xff" * 99, "its header has 18,446,744,073,709,551,615 bytes"),
        (lambda data: data[:-1], r"it has \d+ bytes, not \d+"),
        (lambda data: data + b"more", r"it has \d+ bytes, not \d+"),
        (lambda data: data.replace(b"{", b"[", 1), "cannot be read as an expert"),
        (lambda data: data.replace(b'"dtype"', b'"typed"', 1), "cannot be read as an expert"),
        (lambda data: data.replace(b"[", b"9", 1), "cannot be read as an expert"),
    ],
)
def test_a_damaged_header_is_refused(
    damage: Callable[[bytes], bytes], says: str, local: Registry, factors: Factors, tmp_path: Path
) -> None:
    path = tmp_path / "z.safetensors"
    save_file(vectors(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ExpertError, match=says):
        import_expert(local, "math", path, factors)


@pytest.mark.parametrize("spell", [str, "{}.weight".format, lambda name: f"{name}.weight".replace(".", "_")])
def test_names_are_read_in_every_spelling(spell, local: Registry, factors: Factors, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file({spell(name): z for name, z in vectors().items()}, tmp_path / "z.safetensors")
    import_expert(local, "math", tmp_path / "z.safetensors", factors)
    assert equal(local.load("math"), vectors())


def test_the_reference_codes_checkpoint_composes_the_same_matrices(
    local: Registry, factors: Factors, tmp_path: Path
) -> None:
    """Its composed matrix, computed as that code does: `U diag(s * sigmoid(p)) V^T * sum(s) / sum(s * sigmoid(p))`."""
    p = {f"{name}.weight": torch.nn.Parameter((z * 3).bfloat16()) for name, z in vectors().items() if ".mlp." in name}
    torch.save(p, tmp_path / "learnable_params.pt")
    import_expert(local, "theirs", tmp_path / "learnable_params.pt", factors)
    expert = local.load("theirs", base_digest=factors.base_digest, layout=factors.layout)
    assert expert.manifest.rescaled and len(expert.z) == 2
    for name, z in expert.z.items():
        u, s, vh = factors.load(name)
        mask = torch.sigmoid(p[f"{name}.weight"].detach().float())
        theirs = (u @ torch.diag_embed(s * mask) @ vh) * (s.sum() / (s * mask).sum())
        torch.testing.assert_close((u * (s * z)) @ vh, theirs)


def test_equal_numbers_in_a_reference_checkpoint_are_the_base(
    local: Registry, factors: Factors, tmp_path: Path
) -> None:
    torch.save({f"{target.name}.weight": torch.full((target.rank,), 0.1) for target in LAYOUT}, tmp_path / "p.pt")
    import_expert(local, "same", tmp_path / "p.pt", factors)
    torch.testing.assert_close(torch.cat(list(local.load("same").z.values())), torch.ones(10))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({"model.layers.7.mlp.up_proj": torch.ones(3)}, r"'model\.layers\.7\.mlp\.up_proj' is no target"),
        ({LAYOUT[1].name: torch.ones(4)}, r"has the shape \(4,\); its factors need \(3,\)"),
        ({LAYOUT[1].name: torch.ones(3), f"{LAYOUT[1].name}.weight": torch.ones(3)}, "twice"),
        ({LAYOUT[1].name: torch.full((3,), float("nan"))}, "finite"),
        ({LAYOUT[1].name: 3}, "has the shape int"),
        ([torch.ones(3)], "holds a list"),
        ({}, "no targets"),
    ],
)
def test_what_does_not_fit_is_not_imported(
    found: object, says: str, local: Registry, factors: Factors, tmp_path: Path
) -> None:
    torch.save(found, tmp_path / "p.pt")
    with pytest.raises(ExpertError, match=says):
        import_expert(local, "bad", tmp_path / "p.pt", factors)
    assert local.names() == ()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("evil",)


def test_code_in_a_pickle_does_not_run(
    local: Registry, factors: Factors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name in ("zip.pt", "plain.pt", "text.pt", "empty.pt", "missing.pt"):
        with pytest.raises(ExpertError, match=f"{name} cannot be read safely"):
            import_expert(local, "bad", tmp_path / name, factors)
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.safetensors", "missing"):
        with pytest.raises(ExpertError, match="cannot be read as an expert"):
            import_expert(local, "bad", tmp_path / name, factors)
    assert not (tmp_path / "evil").exists() and local.names() == ()


# ----------------------------------------------------------------------------------------------------------- histogram


def test_the_histogram_has_a_line_a_kind_with_its_figures(local: Registry) -> None:
    z = {"l.0.up_proj": torch.tensor([0.5, 1.0]), "l.1.up_proj": torch.tensor([1.5, 1.0]), "l.0.q": torch.ones(3)}
    local.save("math", z, base_digest=BASE)
    head, up, q = histogram(local.load("math")).splitlines()
    assert "[0.5, 1.5]" in head
    assert up.split() == ["up_proj", "▄", "█", "▄", "0.500", "1.000", "1.500", "4"]
    assert q.split() == ["q", "█", "1.000", "1.000", "1.000", "3"]


def test_the_histogram_of_the_base_is_one_bar(local: Registry) -> None:
    local.save("same", {"l.0.q": torch.ones(3)}, base_digest=BASE)
    assert histogram(local.load("same")).splitlines()[1].split() == ["q", "█", "1.000", "1.000", "1.000", "3"]


# ------------------------------------------------------------------------------------------------------- the heat map


def test_a_heat_map_is_the_mean_over_all_singular_values_of_a_layer_and_kind() -> None:
    """Two matrices share a layer and a kind, as those of MoE experts do; layer 0 has no `v_proj`."""
    names = (("0.q_proj", 0, 2), ("3.experts.0.q_proj", 3, 1), ("3.experts.1.q_proj", 3, 3), ("3.v_proj", 3, 1))
    layout = [Target(name=name, layer=layer, m=4, n=rank, rank=rank) for name, layer, rank in names]
    z_K = torch.tensor([1.5, 0.5, 2.0, 0.0, 1.0, 0.0, 1.25])
    places = {"layers": (0, 3), "kinds": ("q_proj", "v_proj")}
    assert mean_shift(layout, z_K) == HeatMap(values=((0.0, 0.0), (-0.25, 0.25)), **places)
    assert mean_distance(layout, z_K) == HeatMap(values=((0.5, 0.0), (0.75, 0.25)), **places)
