"""timm's models: its own transform to the byte, its weights from files, and what is refused."""

import copy
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from mgpu_ddp.config.schema import Config, FakeConfig, FolderConfig, OutputConfig, TimmConfig, TransformConfig
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import UsageError
from mgpu_ddp.models.build import build_model
from mgpu_ddp.models.head import embedding_dim, head_of
from mgpu_ddp.models.input_transform import choose_transform
from mgpu_ddp.models.prepare import prepare
from mgpu_ddp.models.weights import load_weights, weights_digest
from tests.support.choices import resolved
from tests.support.hubs import point_to


def job(name: str, **changes: object) -> Config:
    return Config(
        data=FolderConfig(root="."),
        transform=TransformConfig(),
        model=TimmConfig(**{"name": name, "weights": None, "num_classes": 5} | changes),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_efficientnet", "convnextv2_nano.fcmae_ft_in22k_in1k_384"]
)
def test_images_are_prepared_as_timm_does(name: str) -> None:
    model = build_model(job(name))
    transform = choose_transform(job(name), model)
    theirs = create_transform(**resolve_data_config(model=model.module), is_training=False)
    noise = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 333), (97, 61)):
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = torch.from_numpy(transform.geometry(image).copy())[None]
        ours = transform.normalise(pixels, dtype=torch.float32, channels_last=False)[0]
        assert torch.equal(ours, theirs(image))


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(77)
    module = timm.create_model("test_resnet", num_classes=5)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    config = job("test_resnet", weights=str(tmp_path / "w.safetensors"))
    model = build_model(config)
    load_weights(model, config.model)
    assert weights_digest(model.module) == weights_digest(module)


@pytest.mark.parametrize("name", ["nosuch", "hf_hub:someone/model", "local-dir:/tmp"])
def test_names_are_those_of_its_list(name: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.name must be a timm model, got"):
        build_model(job(name))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resnet18.a9_in1k", "resnet18.a3_in1k"),
        ("vit_tiny_patch16_242", "vit_tiny_patch16_224"),
        ("timm/resnet19", "resnet18"),
    ],
)
def test_a_slip_is_one_line_that_names_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.name must be a timm model, got '{name}'.* Did you mean {meant}\?$"):
        build_model(job(name))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_embeddings_of_heads_that_are_not_one_linear_layer_are_refused(name: str) -> None:
    config = replace(job(name), output=OutputConfig(fields=["embedding"]))
    with pytest.raises(UsageError, match=rf"^output\.fields must be without embedding for .*, got '{name} with "):
        build_model(config)
    build_model(job(name))


def test_a_model_whose_tracing_finds_constants_of_many_dimensions_runs(world: World) -> None:
    model = build_model(job("swinv2_tiny_window8_256"))
    module = model.module.eval()
    images = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        wanted = module(images)
        folded = prepare(
            replace(model, module=copy.deepcopy(module)), job("swinv2_tiny_window8_256"), resolved(), world
        )
        assert torch.allclose(folded(images), wanted, atol=1e-4)


def test_weights_are_files_or_the_hubs() -> None:
    with pytest.raises(UsageError, match=r"^model\.weights must be null, DEFAULT or a path to .* got 'IMAGENET1K_V1'"):
        build_model(job("test_vit", weights="IMAGENET1K_V1"))
    with pytest.raises(
        UsageError, match=r"^model\.num_classes must be 1000 for the weights timm/test_vit\.r160_in1k, got 5"
    ):
        build_model(job("test_vit", weights="DEFAULT"))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "mobilenetv3_small_050", "convnext_atto"])
def test_the_embedding_is_what_timm_gives_its_classifier(name: str, world: World) -> None:
    model = build_model(job(name))
    module = model.module.eval()
    width = embedding_dim(module, 5)
    folded = prepare(replace(model, module=copy.deepcopy(module)), job(name), resolved(), world)
    seen: list[torch.Tensor] = []
    head_of(folded, 5).register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        logits = folded(images)
        features = module.forward_head(module.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert tuple(seen[0].shape) == (2, width)
    assert torch.allclose(seen[0], features.flatten(1), atol=1e-5)
    assert torch.allclose(logits, module(images), atol=1e-5)


def test_a_fake_dataset_has_the_size_of_the_model() -> None:
    config = replace(job("test_vit"), data=FakeConfig())
    assert choose_transform(config, build_model(config)).out_size == (160, 160)


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_without_a_network_one_line_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config = job("test_resnet", weights="DEFAULT", num_classes=None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if how == "refused":
            server.close()
        point_to(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
        began = time.monotonic()
        with pytest.raises(UsageError) as raised:
            load_weights(build_model(config), config.model)
        assert time.monotonic() - began < 10
    text = str(raised.value)
    assert f"Fetch http://127.0.0.1:{port}/timm/test_resnet.r160_in1k/resolve/main/model.safetensors where" in text
    assert text.endswith(f"to {tmp_path}; model.weights=null is random ones.")
    assert "\n" not in text


def test_the_number_of_classes_is_the_weights() -> None:
    model = build_model(job("vit_tiny_patch16_224.augreg_in21k", weights="DEFAULT", num_classes=None))
    assert (model.num_classes, model.weights) == (21843, "timm/vit_tiny_patch16_224.augreg_in21k")
    with pytest.raises(
        UsageError, match=r"^model\.name must be a model whose own weights have classes, got 'vit_small_"
    ):
        build_model(job("vit_small_patch14_dinov2.lvd142m", weights="DEFAULT", num_classes=None))
