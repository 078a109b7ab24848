"""Models of installed packages: found by name, the same on all ranks, and the words for those that cannot be."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mgpu_ddp.config.schema import PluginConfig, TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.plugin_model import find_plugin, with_plugin
from tests.support.packages import install
from tests.support.worlds import Case, ended, run_job, run_world, tiny

NET = """
import torch
from torchvision.transforms import v2

class Net(torch.nn.Module):
    def transform(self):
        raise RuntimeError("not what is looked for")

    def forward(self, images):
        return {"mean": images.mean((1, 2, 3)), "height": torch.full((len(images),), images.shape[2])}

def build():
    return Net()

def double(returned):
    return {name: 2 * value for name, value in returned.items()}

def small():
    return v2.Compose([v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

def build_all():
    return Net()

build_all.transform, build_all.outputs = small, double
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, which is imported from."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def job(name: str, **changes: Any) -> Any:
    return tiny(model=PluginConfig(name=name), **changes)


def heights(run_dir: Path) -> set[int]:
    import mgpu_ddp

    return set(mgpu_ddp.open(run_dir).table()["height"].to_pylist())


def refused(name: str, run_dir: Path, world: World, **changes: Any) -> str:
    with pytest.raises(UsageError) as raised:
        run_job(job(name, **changes), run_dir, world)
    assert not run_dir.exists()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_package_brings_what_a_script_would(site: Path, tmp_path: Path, world: World) -> None:
    entries = {"plain": "lab_a:build", "net": "lab_a:Net", "whole": "lab_a:build_all"}
    install(site, "lab_a", "1.0", entries, NET)
    for name in ("plain", "net"):
        run_job(job(name), tmp_path / name, world)
        assert heights(tmp_path / name) == {32}
    run_job(job("whole"), tmp_path / "whole", world)
    assert heights(tmp_path / "whole") == {2 * 16}
    run_job(job("whole", transform=TransformConfig(name="plain", size=24)), tmp_path / "sized", world)
    assert heights(tmp_path / "sized") == {2 * 24}
    found = json.loads((tmp_path / "whole" / "manifest.json").read_text())["fingerprint"]
    assert {key: found[f"model.{key}"] for key in ("name", "outputs", "version")} == {
        "name": "plugin/whole/lab_a.Net",
        "outputs": "lab_a.double",
        "version": "lab_a 1.0",
    }
    said = refused("whole", tmp_path / "keys", world, transform=TransformConfig(mean=0.5))
    assert said.startswith("transform.mean must be left out where lab_a 1.0 brings the transform, got [0.5, 0.5, 0.5]")
    mine = Script(outputs=lambda returned: returned, version="b")
    brought = with_plugin(mine, job("whole"), world)
    assert (brought.outputs, brought.version) == (mine.outputs, "lab_a 1.0 b")


def test_another_version_is_another_job(site: Path, tmp_path: Path, world: World) -> None:
    install(site, "lab_b", "1.0", {"b": "lab_b:build"}, NET)
    run_job(job("b"), tmp_path / "run", world)
    (site / "lab_b-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lab_b\nVersion: 1.1\n")
    with pytest.raises(UsageError, match=r"model\.version='lab_b 1\.0' there, 'lab_b 1\.1' here"):
        run_job(job("b"), tmp_path / "run", world)


def test_what_cannot_be_found_or_loaded_is_one_line(site: Path, tmp_path: Path, world: World) -> None:
    run_dir = tmp_path / "run"
    remedy = "Install the package that offers it, in this environment."
    assert refused("x", run_dir, world) == f"model.name must be a plugin that is installed (none is), got 'x'. {remedy}"
    entries = {
        "twice": "lab_c:build",
        "lacks": "lab_c:nothing",
        "gone": "lab_gone:build",
        "instance": "lab_c:NET",
        "number": "lab_c:NUMBER",
        "raises": "lab_c:raises",
        "leaves": "lab_leaves:build",
        "not": "lab_c:not_a_module",
        "forward": "lab_c:Forward",
        "bad_outputs": "lab_c:bad_outputs",
    }
    code = NET + (
        "NET, NUMBER = Net(), 3\n"
        "def not_a_module(): return 3\n"
        "def raises():\n    return torch.zeros(2) @ torch.zeros(3)\n"
        "class Forward(torch.nn.Module):\n    def forward(self, images):\n        return images @ torch.ones(3, 2)\n"
        "def bad_outputs(): return Net()\n"
        "bad_outputs.outputs = 3\n"
    )
    line = {text: number for number, text in enumerate(code.splitlines(), 1)}
    install(site, "lab_c", "1.0", entries, code)
    install(site, "lab_d", "2.0", {"twice": "lab_c:build"})
    (site / "lab_leaves.py").write_text("import sys\n\nsys.exit('no licence')\n")
    for name in ("os:system", "lab_c:build", "lab_c", "../site-packages/lab_c.py", "", "\x1b[31m"):
        said = refused(name, run_dir, world)
        assert said.startswith("model.name must be a plugin that is installed (bad_outputs, forward, gone, instance,")
        assert "\x1b" not in said
    whole = "lab_c:{} of lab_c 1.0 must be a function for its {}, as mgpu_ddp.main takes it, got '{}'. Fix the package."
    broken = "model.name={}: {} of lab_c 1.0 cannot be imported: {}. Fix the package, or install another version."
    at = "(lab_c.py, line {})".format
    where = at(line["    return torch.zeros(2) @ torch.zeros(3)"])
    for name, expected in {
        "twice": "model.name must be offered by one package, not by lab_c 1.0 and lab_d 2.0, got 'twice'. Leave"
        " only one of them.",
        "lacks": broken.format("lacks", "lab_c:nothing", "AttributeError: module 'lab_c' has no attribute 'nothing'"),
        "gone": broken.format("gone", "lab_gone:build", "ModuleNotFoundError: No module named 'lab_gone'"),
        "leaves": broken.format("leaves", "lab_leaves:build", "SystemExit: no licence (lab_leaves.py, line 3)"),
        "instance": whole.format("NET", "model", "Net"),
        "number": whole.format("NUMBER", "model", "int"),
        "bad_outputs": whole.format("bad_outputs", "outputs", "int"),
        "not": "model must be a function that returns an nn.Module, got 3 from it. Return one.",
    }.items():
        assert refused(name, run_dir, world) == expected
    assert f" {where}. Fix it and start again." in refused("raises", run_dir, world)
    said = refused("forward", run_dir, world)
    assert f" {at(line['        return images @ torch.ones(3, 2)'])} for a batch of (2, 3, 32, 32)." in said


def see_a_package_of_its_own(folders: list[str], name: str, world: World) -> str:
    """Look for a plugin where this rank has it."""
    import sys

    sys.path.insert(0, folders[world.rank])
    try:
        return str(with_plugin(Script(), job(name), world).version)
    finally:
        sys.path.remove(folders[world.rank])


def test_ranks_agree_on_the_package(tmp_path: Path) -> None:
    folders = [str(install(tmp_path / str(rank), "lab_e", f"1.{rank}", {"e": "lab_e:build"}, NET)) for rank in range(2)]
    (tmp_path / "none").mkdir()

    def looks(name: str, places: list[str]) -> Case:
        return Case(name=name, call=partial(see_a_package_of_its_own, places, "e"))

    cases = [
        looks("same", [folders[0]] * 2),
        looks("other", folders),
        looks("lacking", [folders[0], str(tmp_path / "none")]),
    ]
    run_world(2, cases, tmp_path / "out")
    assert ended(tmp_path / "out", "same", 2) == ["lab_e 1.0"] * 2
    for rank, other in ((0, 1), (1, 0)):
        assert ended(tmp_path / "out", "other", 2)[rank] == {
            "raised": "UsageError",
            "text": f"model.name=e must be of one package on all ranks, got 'lab_e 1.{rank} on rank {rank} and lab_e"
            f" 1.{other} on rank {other}'. Install the same version everywhere.",
        }
        lacking = ended(tmp_path / "out", "lacking", 2)[rank]
        assert lacking["raised"] == "UsageError"
        assert lacking["text"].startswith("model.name must be a plugin that is installed (none is), got 'e'")


def test_a_package_that_is_not_asked_for_is_not_imported(site: Path, world: World) -> None:
    import sys

    install(site, "lab_f", "1.0", {"f": "lab_f:build"}, "raise RuntimeError\n")
    install(site, "lab_g", "1.0", {"g": "lab_g:build"}, NET)
    assert find_plugin("f")[1] == "lab_f 1.0"
    assert isinstance(with_plugin(Script(), job("g"), world).model(), torch.nn.Module)  # type: ignore[misc]
    assert "lab_f" not in sys.modules
