"""Classes by their embeddings: the plain computation with features of image towers, and files that are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mgpu_ddp.config.schema import (
    Config,
    FolderConfig,
    ModelConfig,
    OutputConfig,
    TimmConfig,
    TransformConfig,
)
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.inference.predictor import Predictor
from mgpu_ddp.models.build import build_model, load_model
from mgpu_ddp.models.prepare import prepare
from mgpu_ddp.models.weights import weights_digest
from mgpu_ddp.models.zero_shot import CosineHead, read_zero_shot
from tests.support.choices import resolved
from tests.support.zero_shot import NAMES, plain, save_classes


def job(path: Path | None, family: type[ModelConfig] = TimmConfig, **changes: Any) -> Config:
    chosen = {"name": "test_vit", "weights": None, "zero_shot": str(path) if path else None} | changes
    return Config(data=FolderConfig(root="."), transform=TransformConfig(), model=family(**chosen))


def loaded(config: Config, world: World) -> Any:
    return load_model(config, Script(), world)


def refusal(config: Config, world: World) -> str:
    with pytest.raises(UsageError) as raised:
        loaded(config, world)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_logits_are_scaled_cosines_of_what_the_tower_returns(tmp_path: Path, world: World) -> None:
    path, classes = save_classes(tmp_path / "c.safetensors", width=48, bias=-3.0)
    tower = timm.create_model("test_vit", num_classes=48).eval()
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    model = loaded(job(path, weights=str(tmp_path / "tower.pt")), world)
    images = torch.randn(3, 3, 160, 160)
    with torch.inference_mode():
        assert torch.allclose(model.module.eval()(images), plain(tower(images), classes), rtol=1e-5, atol=1e-5)
    assert (model.num_classes, model.class_names) == (len(NAMES), NAMES)
    assert weights_digest(model.module.tower) == weights_digest(tower)


@pytest.mark.parametrize(
    ("family", "name", "width"),
    [
        (TimmConfig, "test_vit", 64),
        (TimmConfig, "mobilenetv3_small_050", 1024),
        (ModelConfig, "resnet18", 512),
        (ModelConfig, "squeezenet1_1", 512),
        (ModelConfig, "mobilenet_v3_small", 1024),
    ],
)
def test_else_of_the_embedding(tmp_path: Path, world: World, family: type[ModelConfig], name: str, width: int) -> None:
    path, classes = save_classes(tmp_path / "c.safetensors", width=width)
    bare = loaded(job(None, family, name=name, num_classes=7), world)
    torch.save(bare.module.state_dict(), tmp_path / "w.pt")
    config = replace(
        job(path, family, name=name, weights=str(tmp_path / "w.pt")),
        output=OutputConfig(fields=["embedding", "logits"]),
    )
    images = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8)

    def columns(config: Config, model: Any) -> Any:
        module = prepare(model, config, resolved(), world)
        return Predictor(module, config, resolved(), world.device, num_classes=model.num_classes)(images, 3)

    seen = columns(replace(config, model=replace(config.model, zero_shot=None)), bare)["embedding"]
    found = columns(config, loaded(config, world))
    assert seen.shape == (3, width)
    assert torch.allclose(found["embedding"], seen, atol=1e-5)
    assert torch.allclose(found["logits"], plain(found["embedding"], classes), atol=1e-4)


def test_random_weights_return_the_width_of_the_embeddings(tmp_path: Path, world: World) -> None:
    path, _ = save_classes(tmp_path / "c.safetensors", width=40)
    assert isinstance(loaded(job(path), world).module.tower.head, nn.Linear)


def test_a_tower_that_ends_in_features_has_them_compared(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit_base_patch16_siglip_224.webli"
    path, _ = save_classes(tmp_path / "c.safetensors", width=768)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = build_model(job(path, name=name, weights="DEFAULT"))
    assert (model.num_classes, model.num_features) == (None, 768)
    with pytest.raises(UsageError, match=r"end in features'\. Name classes for its features by model\.zero_shot"):
        build_model(job(None, name=name, weights="DEFAULT"))


def test_half_precision_and_folding_are_the_towers(tmp_path: Path, world: World) -> None:
    path, classes = save_classes(tmp_path / "c.safetensors", width=512)
    config = job(path, ModelConfig, name="resnet18")
    model = loaded(config, world)
    module = prepare(model, config, resolved(precision="bf16"), world)
    assert module.head.weight.dtype == torch.float32
    assert next(module.tower.parameters()).dtype == torch.bfloat16
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    features = torch.randn(4, 512).bfloat16()
    assert torch.allclose(module.head(features), plain(features.float(), classes), rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_has_no_direction_and_nan_is_an_error(tmp_path: Path) -> None:
    path, _ = save_classes(tmp_path / "c.safetensors", width=4)
    head = CosineHead(read_zero_shot(path))
    logits = head(torch.tensor([[0.0] * 4, [1, 2, 3, float("inf")]]))
    assert logits[0].tolist() == [0.0] * len(NAMES)
    assert logits[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embeddings_may_be_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    path, classes = save_classes(tmp_path / "c.safetensors", width=4, dtype=dtype)
    features = torch.randn(3, 4)
    assert torch.allclose(CosineHead(read_zero_shot(path))(features), plain(features, classes), rtol=1e-5, atol=1e-5)


def test_other_widths_are_refused(tmp_path: Path, world: World) -> None:
    path, _ = save_classes(tmp_path / "c.safetensors", width=48)
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "w.pt")
    text = refusal(job(path, weights=str(tmp_path / "w.pt")), world)
    assert (
        "model.zero_shot must be a file of width 5, which the model returns, or 64, which its classifier sees" in text
    )
    assert f"got '{path} of 48'" in text


def test_a_classifier_of_several_layers_sees_no_embedding(tmp_path: Path, world: World) -> None:
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name, num_classes=5).state_dict(), tmp_path / "w.pt")
    path, _ = save_classes(tmp_path / "c.safetensors", width=192)
    text = refusal(job(path, name=name, weights=str(tmp_path / "w.pt")), world)
    assert "must be a file of width 5, which the model returns, got" in text


@pytest.mark.parametrize(("key", "value"), [("num_classes", 3), ("class_names", "names.txt")])
def test_keys_that_say_other_classes_are_refused(tmp_path: Path, world: World, key: str, value: Any) -> None:
    path, _ = save_classes(tmp_path / "c.safetensors", width=48)
    text = refusal(job(path, **{key: value}), world)
    assert text.startswith(f"model.{key} must be null with model.zero_shot, whose file has the classes, got {value!r}.")


def hostile() -> dict[str, tuple[dict[str, Any], Any, str]]:
    """Tensors, names and what the line says."""
    good = {"embeddings": torch.randn(3, 4), "logit_scale": torch.tensor(100.0)}
    zeros, nan = torch.randn(3, 4), torch.randn(3, 4)
    zeros[1], nan[2, 3] = 0, float("nan")
    return {
        "nothing": ({}, NAMES, "a file of the tensors embeddings"),
        "no scale": ({"embeddings": good["embeddings"]}, NAMES, "a file of the tensors embeddings"),
        "another tensor": (good | {"text": torch.ones(1)}, NAMES, "a file of the tensors embeddings"),
        "integers": (good | {"embeddings": torch.ones(3, 4).int()}, NAMES, "a file of F32, F16, BF16"),
        "three dimensions": (good | {"embeddings": torch.ones(3, 4, 1)}, NAMES, "of at least two classes"),
        "one class": (good | {"embeddings": torch.ones(1, 4)}, NAMES[:1], "of at least two classes"),
        "no width": (good | {"embeddings": torch.ones(3, 0)}, NAMES, "of at least two classes"),
        "scales": (good | {"logit_scale": torch.ones(3)}, NAMES, "and scalars"),
        "zeros": (good | {"embeddings": zeros}, NAMES, f"zeros alone for '{NAMES[1]}'"),
        "nan": (good | {"embeddings": nan}, NAMES, f"zeros alone for '{NAMES[2]}'"),
        "scale 0": (good | {"logit_scale": torch.tensor(0.0)}, NAMES, "whose logit_scale is above 0"),
        "scale inf": (good | {"logit_scale": torch.tensor(float("inf"))}, NAMES, "whose logit_scale is above 0"),
        "scale nan": (good | {"logit_scale": torch.tensor(float("nan"))}, NAMES, "whose logit_scale is above 0"),
        "bias nan": (good | {"logit_bias": torch.tensor(float("nan"))}, NAMES, "whose logit_bias is a number"),
        "no names": (good, None, "a list of names"),
        "no list": (good, {"a": 1}, "a list of names"),
        "numbers": (good, [1, 2, 3], "a list of names"),
        "too few": (good, NAMES[:2], "a file of 3 names"),
        "twice": (good, ["cat", "dog", " cat"], "'cat' more than once"),
        "empty": (good, ["cat", "dog", " "], "printable names"),
        "escape": (good, ["cat", "dog", "\x1b[2J"], "printable names"),
        "nested": (good, "[" * 100_000, "a list of names"),
    }


@pytest.mark.parametrize("case", hostile())
def test_hostile_content_is_one_line(tmp_path: Path, case: str) -> None:
    tensors, names, words = hostile()[case]
    text = names if isinstance(names, str) else json.dumps(names)
    save_file(tensors, tmp_path / "c.safetensors", metadata={} if names is None else {"names": text})
    with pytest.raises(UsageError) as raised:
        read_zero_shot(tmp_path / "c.safetensors")
    said = str(raised.value)
    assert said.startswith("model.zero_shot must be ")
    assert words in said
    assert len(said) < 500


def header(content: dict[str, Any]) -> bytes:
    data = json.dumps(content).encode()
    return len(data).to_bytes(8, "little") + data


HUGE = {"dtype": "F16", "shape": [10**9, 512], "data_offsets": [0, 10**12]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 no safetensors",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little"),
        header({"embeddings": HUGE}),
        header({"embeddings": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}) + bytes(16),
    ],
)
def test_files_of_another_kind_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"^model\.zero_shot must be a safetensors, got "):
        read_zero_shot(tmp_path / "c.safetensors")


def test_a_thousand_million_classes_are_refused_before_they_are_read(tmp_path: Path) -> None:
    scale = {"dtype": "F16", "shape": [], "data_offsets": [1024 * 10**9, 1024 * 10**9 + 2]}
    start = header({"embeddings": HUGE | {"data_offsets": [0, 1024 * 10**9]}, "logit_scale": scale})
    with (tmp_path / "c.safetensors").open("wb") as file:
        file.write(start)
        # A hole.
        file.truncate(len(start) + 1024 * 10**9 + 2)
    with pytest.raises(OutOfMemoryError, match=r"^model\.zero_shot must fit into memory, got "):
        read_zero_shot(tmp_path / "c.safetensors")
