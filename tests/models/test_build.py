"""Names → modules: weights from checkpoints of every kind, and the layers that are asked for."""

import os
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from mgpu_ddp.config.schema import (
    Config,
    FakeConfig,
    ModelConfig,
    RuntimeConfig,
    TimmConfig,
    TransformConfig,
)
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.models import identify
from mgpu_ddp.models.build import build_model, load_model, require_head, try_size
from mgpu_ddp.models.head import head_of
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.prepare import prepare, speedups_of
from mgpu_ddp.models.weights import load_weights, weights_digest
from mgpu_ddp.preprocess import transform
from tests.support.choices import resolved
from tests.support.special_files import SPECIAL, special_file

SMALL = "squeezenet1_1"


def job(name: str = SMALL, *, weights: object = None, num_classes: int = 5, **changes: Any) -> Config:
    chosen = ModelConfig(name=name, weights=None if weights is None else str(weights), num_classes=num_classes)
    return Config(**{"data": FakeConfig(), "transform": TransformConfig(), "model": chosen} | changes)


def trained(name: str = SMALL, num_classes: int = 5) -> nn.Module:
    """A module whose numbers no seed of a job gives."""
    torch.manual_seed(77)
    module: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return module


def digest_of(config: Config) -> str:
    """Build and fill a model as rank 0 does."""
    model = build_model(config)
    load_weights(model, config.model)
    return weights_digest(model.module)


class SimpleModel(nn.Module):
    """The tutorial's."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnet(x)


class Compiled(nn.Module):
    """A module as torch.compile wraps it, as far as its keys show."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


WRAPS: dict[str, Any] = {
    "bare": lambda m: m,
    "data parallel": nn.DataParallel,
    "compiled": Compiled,
    "tutorial": SimpleModel,
    "tutorial in data parallel": lambda m: nn.DataParallel(SimpleModel(m)),
    "compiled tutorial in data parallel": lambda m: nn.DataParallel(Compiled(SimpleModel(m))),
    "data parallel, compiled": lambda m: Compiled(nn.DataParallel(m)),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_checkpoint_loads_however_it_was_wrapped(tmp_path: Path, wrap: str, suffix: str) -> None:
    module = trained()
    path = tmp_path / f"weights{suffix}"
    state = WRAPS[wrap](module).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert digest_of(job(weights=path)) == weights_digest(module)


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "args": Namespace(lr=0.1, opt="sgd")},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    ],
)
def test_a_nested_checkpoint_loads(tmp_path: Path, nest: Any) -> None:
    module = trained()
    torch.save(nest(module.state_dict()), tmp_path / "w.pt")
    assert digest_of(job(weights=tmp_path / "w.pt")) == weights_digest(module)


def test_a_checkpoint_without_batch_counters_loads(tmp_path: Path) -> None:
    module = trained("resnet18")
    state = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    model = build_model(job("resnet18", weights=tmp_path / "w.pt"))
    load_weights(model, job("resnet18", weights=tmp_path / "w.pt").model)
    assert all(torch.equal(model.module.state_dict()[k], v) for k, v in state.items())


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("within", [False, True], ids=["bare", "in a namespace"])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, suffix: str, how: str, within: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"weights{suffix}"
    hostile = Namespace(x=Hostile(marker)) if within else Hostile(marker)
    content = {**trained().state_dict(), "x": hostile}
    torch.save(content, path) if how == "torch" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match=r"^model\.weights must be a checkpoint of tensors alone, got '.*weights"):
        digest_of(job(weights=path))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "a checkpoint of tensors alone"),
        (b"not a checkpoint", "a checkpoint of tensors alone"),
        ([torch.zeros(2)], "a state dict"),
        ({"epoch": 3}, "a state dict"),
        ({3: torch.zeros(2), "a": torch.zeros(2)}, "a state dict"),
        ({None: torch.zeros(2)}, "a state dict"),
        (torch.zeros(2), "a state dict"),
        (None, "a readable file"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(tmp_path: Path, content: Any, rule: str) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UsageError) as raised:
        digest_of(job(weights=path))
    text = str(raised.value)
    assert text.startswith(f"model.weights must be {rule}, got '{path}'")
    assert len(text.splitlines()) == 1


ODD: dict[str, Any] = {
    "sparse": lambda bias: bias.to_sparse(),
    "quantized": lambda bias: torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8),
    "meta": lambda bias: bias.to("meta"),
    "complex": lambda bias: bias + 1j,
    "conjugate": lambda bias: (bias + 1j).conj(),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_tensor_that_is_no_array_of_real_numbers_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    state = trained().state_dict()
    state["classifier.1.bias"] = ODD[kind](state["classifier.1.bias"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError) as raised:
        digest_of(job(weights=tmp_path / "w.pt"))
    said = "model.weights must be a checkpoint of dense tensors of real numbers, got "
    assert str(raised.value).startswith(f"{said}'{tmp_path}/w.pt with another at classifier.1.bias'")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".pt", torch.int8), (".safetensors", torch.bool), (".safetensors", torch.uint16)]
)
def test_integers_are_no_weights(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    state = trained().state_dict()
    state["classifier.1.bias"] = torch.ones(5, dtype=dtype)
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    misfit = rf"of another type: classifier\.1\.bias {dtype} for torch\.float32"
    with pytest.raises(UsageError, match=rf"{misfit}\. Save it as floating-point numbers\.$"):
        digest_of(job(weights=path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_checkpoint_that_is_no_regular_file_is_refused_in_one_line(tmp_path: Path, kind: str, suffix: str) -> None:
    path = special_file(kind, tmp_path / f"w{suffix}")
    with pytest.raises(UsageError) as raised:
        digest_of(job(weights=path))
    assert (
        str(raised.value) == f"model.weights must be a readable file, got '{path}' ({SPECIAL[kind]}). Check the path."
    )


def test_a_misfit_names_missing_and_unexpected_keys_and_those_of_another_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There is no other model that it fits.
    monkeypatch.setattr(identify, "SEARCH_S", 0)
    state = trained().state_dict()
    state["extra.weight"] = state.pop("features.0.weight")
    state["classifier.1.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError) as raised:
        digest_of(job(weights=tmp_path / "w.pt"))
    text = str(raised.value)
    assert "model.weights must fit squeezenet1_1 with 5 classes" in text
    assert (
        "missing: features.0.weight; unexpected: extra.weight; of another shape: classifier.1.bias (7,) for (5,)"
        in text
    )
    assert len(text.splitlines()) == 1


def test_another_models_checkpoint_is_refused_with_a_few_keys_named(tmp_path: Path) -> None:
    torch.save(trained("resnet18").state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        UsageError,
        match=r"missing: .*, \.\.\. of 52; unexpected: .*, \.\.\. of 122\. It fits model\.name=resnet18: set that",
    ) as raised:
        digest_of(job(weights=tmp_path / "w.pt"))
    assert len(str(raised.value)) < 1000


def test_random_weights_follow_the_seed() -> None:
    first, again, other = (digest_of(job(seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert "random weights from seed 3" in build_model(job(seed=3)).origin


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("resnet81", "Did you mean resnet18?"),
        ("efficientnet", "Did you mean efficientnet_b0?"),
        ("vit_tiny", "Did you mean timm's vit_tiny_patch16_224? Add model=timm model.name=vit_tiny_patch16_224."),
        ("convnextv2_base", "It is timm's: add model=timm (model=timm model.name=convnextv2_base)."),
        ("resnet18.a1_in1k", "It is timm's: add model=timm (model=timm model.name=resnet18.a1_in1k)."),
        ("fasterrcnn_resnet50_fpn", "It detects objects: bring it by a script (examples/detector.py, docs/own.md)."),
        ("fcn_resnet50", "It segments images: bring it by a script (docs/own.md)."),
        ("deeplabv3", "deeplabv3_mobilenet_v3_large segments images: bring it by a script (docs/own.md)."),
        ("s3d", "It takes videos: bring it by a script (docs/own.md)."),
        ("mine.py", "Start it as a script that calls mgpu_ddp.main: mgpu-infer mine.py (docs/own.md)."),
        ("net.pt", "Give it as model.weights=net.pt."),
        ("xyzzy", "docs/models.md says how to list them, and docs/own.md how a script brings its own."),
    ],
)
def test_an_unknown_model_is_told_where_to_go(name: str, way: str) -> None:
    with pytest.raises(UsageError) as raised:
        build_model(job(name))
    assert str(raised.value) == f"model.name must be a torchvision classification model, got {name!r}. {way}"


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("resnet19", "Did you mean resnet18?"),
        ("resnet18.a9_in1k", "Did you mean resnet18.a3_in1k?"),
        ("mobilenet_v3_large", "It is torchvision's: leave model=timm out."),
        ("fasterrcnn_resnet50_fpn", "It detects objects: bring it by a script (examples/detector.py, docs/own.md)."),
        ("mine.py", "Start it as a script that calls mgpu_ddp.main: mgpu-infer mine.py (docs/own.md)."),
        ("net.ckpt", "Give it as model.weights=net.ckpt."),
        ("xyzzy", "timm.list_models() names them; a script brings its own (docs/own.md)."),
    ],
)
def test_an_unknown_model_of_timm_is_told_where_to_go(name: str, way: str) -> None:
    config = Config(data=FakeConfig(), transform=TransformConfig(), model=TimmConfig(name=name, weights=None))
    with pytest.raises(UsageError) as raised:
        build_model(config)
    assert str(raised.value).startswith(f"model.name must be a timm model, got {name!r}")
    assert str(raised.value).endswith(f". {way}")


@pytest.mark.parametrize("weights", ["IMAGENET", "default", "weights.tar"])
def test_unknown_weights_name_the_known_ones(weights: str) -> None:
    with pytest.raises(UsageError, match=r"model\.weights must be null, DEFAULT, IMAGENET1K_V1 or a path to \.pt/"):
        build_model(job(weights=weights, num_classes=1000))


def test_named_weights_have_the_classes_they_have() -> None:
    said = (
        r"^model\.num_classes must be 1000 for the weights IMAGENET1K_V1, got 5\. Give a checkpoint of 5 classes"
        r" \(model\.weights=FILE\.pt\), leave model\.num_classes out, or set model\.weights=null for random ones\.$"
    )
    with pytest.raises(UsageError, match=said):
        build_model(job(weights="DEFAULT"))
    model = build_model(job(weights="DEFAULT", num_classes=1000))
    assert model.class_names is not None
    assert (model.num_classes, len(model.class_names), model.class_names[0]) == (1000, 1000, "tench")


def test_weights_that_cannot_be_reached_name_the_file_and_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens on the discard port: offline, at once
    config = job(weights="DEFAULT", num_classes=1000)
    with pytest.raises(UsageError) as raised:
        digest_of(config)
    text = str(raised.value)
    assert text.startswith("model.weights must be on this machine or reachable, got 'DEFAULT'")
    place = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    url = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    roads = "give a checkpoint of yours (model.weights=FILE.pt), or set model.weights=null for random ones."
    assert text.endswith(f"Put {url} at {place}, {roads}")
    assert len(text.splitlines()) == 1

    module = trained(num_classes=1000)
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), place)
    assert digest_of(config) == weights_digest(module), "the file is found where the message says"


@pytest.mark.parametrize("content", [b"cut short", Hostile], ids=["broken", "hostile"])
def test_a_bad_file_in_the_cache_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(content if isinstance(content, bytes) else pickle.dumps(Hostile(tmp_path / "marker")))
    with pytest.raises(UsageError, match=r"model\.weights .*squeezenet1_1-b8a52dc0\.pth"):
        digest_of(job(weights="DEFAULT", num_classes=1000))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", SMALL])
def test_folding_keeps_the_logits(name: str, world: World) -> None:
    module = trained(name).eval()
    with torch.inference_mode():
        images = torch.randn(2, 3, 64, 64)
        expected = module(images)
        model = Model(module=module, num_classes=5, identity={}, origin="", class_names=None, preset=None)
        folded = prepare(model, job(name), resolved(), world)
        assert (folded(images) - expected).abs().max() < 1e-4
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == []
    assert not any(p.requires_grad for p in folded.parameters())


def test_folding_can_be_switched_off(world: World) -> None:
    config = job("resnet18", runtime=RuntimeConfig(fold=False, channels_last=False))
    module = prepare(build_model(config), config, resolved(speedups=speedups_of(config)), world)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in module.modules()) == 20
    assert not module.training


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), (SMALL, 512), ("vit_b_16", 768), ("mobilenet_v3_small", 1024), ("densenet121", 1024)],
)
def test_the_head_turns_features_into_logits(name: str, width: int) -> None:
    with torch.device("meta"):
        module = torchvision.models.get_model(name, weights=None, num_classes=7)
    head = head_of(module, 7)
    given = head.in_channels if isinstance(head, nn.Conv2d) else head.in_features
    made = head.out_channels if isinstance(head, nn.Conv2d) else head.out_features
    assert (given, made) == (width, 7)


@pytest.mark.parametrize("name", ["resnet18", SMALL])
@pytest.mark.parametrize("fold", [True, False])
def test_more_classes_than_fit_are_refused_before_they_are_made(name: str, fold: bool) -> None:
    """The head of a model takes weights and a bias for each class, twice while batch norms are folded."""
    classes = 10**9
    config = job(name, num_classes=classes, runtime=RuntimeConfig(fold=fold))
    needed = classes * (512 + 1) * 4 * (2 if fold else 1)
    require_head(config, config.model, needed)
    with pytest.raises(OutOfMemoryError, match=r"^model\.num_classes must fit into memory, got 1000000000: it takes "):
        require_head(config, config.model, needed - 1)


class Picky(nn.Module):
    """Takes images of one size alone, as ViTs do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[-2:] == (30, 30), "not the size\nof a ViT"
        return images


def test_a_size_that_the_model_does_not_take_is_refused_with_the_one_that_it_does() -> None:
    picky = Model(module=Picky(), num_classes=5, identity={}, origin="", class_names=None, preset=None, input_size=30)
    for model, size, own, why in (
        (build_model(job()), 1, 224, "RuntimeError: Calculated padded input size"),
        (picky, 224, 30, "AssertionError: not the size of a ViT"),
    ):
        with pytest.raises(UsageError) as raised:
            try_size(model, job(), transform.imagenet(size))
        said = f"transform.size must be a size that squeezenet1_1 takes, got {size} ({why}"
        assert str(raised.value).startswith(said)
        assert str(raised.value).endswith(f"). Try transform.size={own}.")
        assert "\n" not in str(raised.value)
    try_size(picky, job(), transform.plain(30))


@pytest.mark.parametrize(
    ("keys", "size", "said"),
    [
        (
            {"crop": [30, 8]},
            (30, 8),
            "transform.crop must be a size that squeezenet1_1 takes, got 30x8 (",
        ),
        ({"resize": [8, 8], "crop": None}, (8, 8), "transform.resize must be a size that squeezenet1_1 takes, got 8 ("),
    ],
)
def test_the_key_that_says_the_size_is_named(keys: dict[str, Any], size: tuple[int, int], said: str) -> None:
    picky = Model(module=Picky(), num_classes=5, identity={}, origin="", class_names=None, preset=None, input_size=30)
    chosen = transform.Transform(resize=size, crop=keys["crop"] and size)
    with pytest.raises(UsageError) as raised:
        try_size(picky, job(transform=TransformConfig(**keys)), chosen)
    assert str(raised.value).startswith(said)
    assert str(raised.value).endswith("Try transform.crop=30." if keys["crop"] else "Try transform.resize=[30,30].")


def test_sizes_that_a_model_takes_are_kept() -> None:
    model = build_model(job())
    for size in (32, 224, 300):
        try_size(model, job(), transform.plain(size))


@pytest.mark.parametrize("name", ["resnet18", SMALL])
def test_the_head_is_still_found_after_folding(name: str, world: World) -> None:
    config = job(name)
    head = head_of(prepare(build_model(config), config, resolved(), world), 5)
    assert (head.out_channels if isinstance(head, nn.Conv2d) else head.out_features) == 5


def test_load_model_fills_rank_zero(tmp_path: Path, world: World) -> None:
    module = trained()
    torch.save(module.state_dict(), tmp_path / "w.pt")
    model = load_model(job(weights=tmp_path / "w.pt"), Script(), world)
    assert weights_digest(model.module) == weights_digest(module)
    assert str(tmp_path / "w.pt") in model.origin
