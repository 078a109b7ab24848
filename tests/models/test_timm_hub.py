"""Fine-tunes of timm in folders and on a hub: as timm itself loads them, and what is refused of their config.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf

from mgpu_ddp.config.schema import Config, FolderConfig, TimmConfig, TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.models.build import load_model
from mgpu_ddp.models.input_transform import choose_transform
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.weights import weights_digest
from tests.support.hubs import COMMIT, Hub, serve

LABELS = ["n01", "n02", "n03"]


def save(folder: Path, name: str = "test_resnet", **arguments: Any) -> torch.nn.Module:
    """A fine-tune as timm pushes it."""
    torch.manual_seed(3)
    module = timm.create_model(name, **{"num_classes": 3} | arguments)
    config = {"label_names": LABELS, "label_descriptions": {"n01": "cat", "n02": "dog"}}
    save_for_hf(module, folder, model_config=config, safe_serialization=True)
    return module


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def job(name: str, **changes: Any) -> Config:
    model = TimmConfig(**{"name": name, "weights": "DEFAULT"} | changes)
    return Config(data=FolderConfig(root="."), transform=TransformConfig(), model=model)


def loaded(name: str, world: World, **changes: Any) -> Model:
    return load_model(job(name, **changes), Script(), world)


def refusal(name: str, world: World, **changes: Any) -> str:
    with pytest.raises(UsageError) as raised:
        loaded(name, world, **changes)
    text = str(raised.value)
    assert text.startswith("model.")
    assert "\n" not in text
    return text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as found:
        yield found


def test_a_folder_is_what_timm_loads_from_it(tmp_path: Path, world: World) -> None:
    save(tmp_path, "vit_tiny_patch16_224", img_size=96)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    model = loaded(f"local-dir:{tmp_path}", world)
    assert weights_digest(model.module) == weights_digest(theirs)
    assert (model.num_classes, model.class_names, model.input_size) == (3, ("cat", "dog", "n03"), 96)
    data = resolve_data_config(model=theirs)
    assert (tuple(model.preset.mean), tuple(model.preset.std)) == (tuple(data["mean"]), tuple(data["std"]))
    assert choose_transform(job(f"local-dir:{tmp_path}"), model).out_size == (96, 96)
    assert model.weights == f"local-dir:{tmp_path}"
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(model.module.eval()(images), theirs.eval()(images))
    # As timm used to export it.
    settings = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    edit(tmp_path, pretrained_cfg=settings | {"input_size": [3, 224, 224]})
    assert loaded(f"local-dir:{tmp_path}", world).input_size == 96


def test_a_repository_is_fetched_once_and_resumed_at_its_commit(
    hub: Hub, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = save(hub.root / "org" / "fruit")
    model = loaded("hf_hub:org/fruit", world)
    assert weights_digest(model.module) == weights_digest(module)
    assert (model.weights, model.class_names) == (f"org/fruit@{COMMIT}", ("cat", "dog", "n03"))
    asked = [name for name in hub.asked if name.startswith("org/")]
    for weights in ("DEFAULT", str(model.weights)):
        again = loaded("hf_hub:org/fruit", world, weights=weights)
        assert weights_digest(again.module) == weights_digest(module)
    assert [name for name in hub.asked if name.startswith("org/")] == asked
    assert set(asked) == {"org/fruit/config.json", "org/fruit/model.safetensors"}


def test_older_files_have_all_side_by_side(tmp_path: Path, world: World) -> None:
    save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    flat = values.pop("pretrained_cfg") | values
    flat["labels"] = flat.pop("label_names")
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert loaded(f"local-dir:{tmp_path}", world).class_names == ("cat", "dog", "n03")


def test_what_is_missing_on_the_hub_is_one_line(hub: Hub, world: World) -> None:
    folder = hub.root / "org" / "fruit"
    assert f"a repository at {hub.url}, got 'hf_hub:org/none' (404" in refusal("hf_hub:org/none", world)
    folder.mkdir(parents=True)
    assert "(it has no config.json). Choose another." in refusal("hf_hub:org/fruit", world)
    save(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "(it has pytorch_model.bin alone). Download it, convert it by" in refusal("hf_hub:org/fruit", world)
    assert not [path for path in (hub.root.parent / "cache").rglob("*") if path.suffix == ".bin"]


def test_weights_of_another_width_are_one_line(tmp_path: Path, world: World) -> None:
    save(tmp_path)
    edit(tmp_path, num_classes=5, label_names=None)
    text = refusal(f"local-dir:{tmp_path}", world)
    assert f"model.weights must fit local-dir:{tmp_path} with 5 classes, got 'DEFAULT': of another shape: fc" in text
    assert text.endswith("The files of its repository do not belong together: choose another.")
    assert "must be 5 for the weights" in refusal(f"local-dir:{tmp_path}", world, num_classes=3)


HOSTILE: dict[str, dict[str, Any]] = {
    "no architecture": {"architecture": None},
    "unknown architecture": {"architecture": "evilnet"},
    "a hub for architecture": {"architecture": "hf_hub:evil/net"},
    "a folder for architecture": {"architecture": "local-dir:/tmp"},
    "classes as text": {"num_classes": "3"},
    "a bool for classes": {"num_classes": True},
    "negative": {"num_classes": -1},
    "no object": {"pretrained_cfg": [1]},
    "sizes": {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
    "two sizes": {"pretrained_cfg": {"input_size": [224, 224]}},
    "crop": {"pretrained_cfg": {"crop_pct": 0}},
    "crop as text": {"pretrained_cfg": {"crop_pct": "__import__('os')"}},
    "border": {"pretrained_cfg": {"crop_mode": "border"}},
    "interpolation": {"pretrained_cfg": {"interpolation": "random"}},
    "mean": {"pretrained_cfg": {"mean": [0, 0]}},
    "std": {"pretrained_cfg": {"std": [0, 0, 0]}},
    "grey": {"pretrained_cfg": {"input_size": [1, 64, 64]}},
    "a checkpoint": {"model_args": {"checkpoint_path": "/etc/passwd"}},
    "pretrained": {"model_args": {"pretrained": True}},
    "a cfg": {"model_args": {"pretrained_cfg": {"file": "/tmp/evil.pt"}}},
    "an overlay": {"model_args": {"pretrained_cfg_overlay": {"file": "/tmp/evil.pt"}}},
    "a layer": {"model_args": {"act_layer": "os.system"}},
    "huge": {"model_args": {"img_size": 10**9}},
    "not an argument of it": {"model_args": {"class_token": False}},
    "args as a list": {"model_args": [1]},
    "too few names": {"label_names": ["a"]},
    "names as numbers": {"label_names": [1, 2, 3]},
    "names that terminals obey": {"label_names": ["a", "b", "\x1b[2J"]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_descriptions_are_one_line(
    tmp_path: Path, world: World, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    edit(tmp_path, **HOSTILE[case])
    # Nothing is fetched either.
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        assert refusal(f"local-dir:{tmp_path}", world).startswith("model.name must be ")
        assert not hub.asked


def test_classes_beyond_memory_are_refused(tmp_path: Path, world: World) -> None:
    save(tmp_path)
    edit(tmp_path, num_classes=10**9)
    with pytest.raises(OutOfMemoryError, match=r"^model\.name must fit into memory, got local-dir:"):
        loaded(f"local-dir:{tmp_path}", world)


def test_nothing_but_what_describes_the_model_is_taken(tmp_path: Path, world: World) -> None:
    save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    extra = {"url": "http://127.0.0.1:9/evil.pt", "file": "/tmp/evil.pt", "hf_hub_id": "evil/net", "source": "url"}
    edit(tmp_path, pretrained_cfg=values["pretrained_cfg"] | extra, auto_map={"AutoModel": "evil.Net"})
    built = loaded(f"local-dir:{tmp_path}", world).module.pretrained_cfg
    assert isinstance(built, dict)
    assert not {key for key, value in extra.items() if built.get(key) == value}
