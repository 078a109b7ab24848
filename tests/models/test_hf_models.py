"""Models of transformers: every family's outputs and images against its own, and what is refused."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Nothing here asks a network, whatever transformers would.
os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from mgpu_ddp.config.schema import Config, FolderConfig, HfConfig, ModelConfig, OutputConfig, TransformConfig
from mgpu_ddp.config.script import Script
from mgpu_ddp.distributed.world import World
from mgpu_ddp.errors import OutOfMemoryError, UsageError
from mgpu_ddp.models.build import build_model, load_model, try_size
from mgpu_ddp.models.hf_config import CLS, FAMILIES
from mgpu_ddp.models.input_transform import choose_transform
from mgpu_ddp.models.model import Model
from mgpu_ddp.models.weights import weights_digest
from tests.support.hf import NAMES, SIDE, TINY, classifier_of, features_of, processor_of, save_model
from tests.support.hubs import COMMIT, serve

Changes = Callable[[dict[str, Any]], object]


def job(folder: Path, **transform: Any) -> Config:
    return Config(data=FolderConfig(root="."), transform=TransformConfig(**transform), model=HfConfig(name=str(folder)))


def load(folder: Path, world: World, **transform: Any) -> Model:
    return load_model(job(folder, **transform), Script(), world)


def change(file: Path, changes: Changes) -> None:
    """Let a function change the object in a JSON file."""
    values = json.loads(file.read_text())
    changes(values)
    file.write_text(json.dumps(values))


def noise(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


def embedding_of(kind: str, model: Any, images: torch.Tensor) -> torch.Tensor:
    """The embedding as the family's users take it."""
    if kind in ("clip", "siglip"):
        found = model.get_image_features(images)
        return found if isinstance(found, torch.Tensor) else found.pooler_output
    found = model(images)
    if kind == "clip_vision_model":
        return found.image_embeds
    return found.last_hidden_state[:, 0] if FAMILIES[kind].embedding == CLS else found.pooler_output.flatten(1)


def test_every_family_is_tried() -> None:
    assert TINY.keys() == FAMILIES.keys()


CLASSIFIERS = [(kind, str(classifier_of(kind))) for kind in FAMILIES if classifier_of(kind)]
OF_TWO = [("deit", "DeiTForImageClassificationWithTeacher"), ("levit", "LevitForImageClassificationWithTeacher")]


@pytest.mark.parametrize(("kind", "architecture"), CLASSIFIERS + OF_TWO)
def test_logits_are_those_of_transformers(kind: str, architecture: str, tmp_path: Path, world: World) -> None:
    theirs = save_model(tmp_path, kind, architecture)
    model = load(tmp_path, world, name="plain")
    assert model.class_names == NAMES
    images = noise(SIDE, SIDE)
    with torch.inference_mode():
        assert torch.equal(model.module.eval()(images), theirs(images).logits)


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.embedding])
def test_embeddings_are_those_of_transformers(kind: str, tmp_path: Path, world: World) -> None:
    theirs = save_model(tmp_path, kind, features_of(kind))
    model = load(tmp_path, world, name="plain")
    assert model.class_names is None
    images = noise(SIDE, SIDE)
    with torch.inference_mode():
        assert torch.equal(model.module.eval()(images)["embedding"], embedding_of(kind, theirs, images))


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in FAMILIES if kind in IMAGE_PROCESSOR_MAPPING_NAMES and "mobilevit" not in kind),
    ("mobilevit", {"size": 288}),
    ("clip", {"size": 50, "crop_size": 41}),
    ("vit", {"resample": 0, "size": 41}),
    ("vit", {"resample": 1, "do_normalize": False}),
    ("vit", {"do_rescale": False, "do_normalize": False}),
    ("efficientnet", {"rescale_factor": 1 / 127.5, "rescale_offset": True}),
    ("efficientnet", {"include_top": False, "do_normalize": False}),
    ("convnext", {"size": {"shortest_edge": 224}, "crop_pct": 0.9}),
]


@pytest.mark.parametrize(("kind", "changes"), PROCESSORS, ids=str)
def test_images_are_prepared_as_by_transformers(
    kind: str, changes: dict[str, Any], tmp_path: Path, world: World
) -> None:
    save_model(tmp_path, "vit", "ViTForImageClassification")
    processor = processor_of(kind)(**changes)
    processor.save_pretrained(tmp_path)
    model = load(tmp_path, world)
    transform = choose_transform(job(tmp_path), model)
    random = np.random.default_rng(0)
    for height, width in ((375, 500), (501, 333), (97, 61)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = torch.from_numpy(transform.geometry(image).copy())[None]
        ours = transform.normalise(pixels, dtype=torch.float32, channels_last=False)
        theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"]))
        if model.module.flips_channels:
            ours = ours.flip(1)
        # DINOv3 resizes after it has scaled, where values are not rounded to levels; others differ in their last bits.
        levels = 1.01 if kind == "dinov3_vit" else 1e-4
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= levels / 255 / min(transform.std or (1,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of a ViT that classifies."""
    save_model(tmp_path, "vit", "ViTForImageClassification")
    processor_of("vit")(size=SIDE).save_pretrained(tmp_path)
    return tmp_path


def refusal(folder: Path, world: World) -> str:
    """The line that a repository is refused with, within seconds."""
    began = time.monotonic()
    with pytest.raises(UsageError) as raised:
        load(folder, world)
    assert time.monotonic() - began < 10
    text = str(raised.value)
    assert text.startswith("model.name must ")
    assert text.endswith((".", "model.safetensors')\", and give the folder."))
    assert "\n" not in text
    assert len(text) < 2000
    return text


CODE = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "code of its own": ({"auto_map": CODE}, r"one without auto_map, got"),
    "a processor of its own": ({"model_type": "mine", "auto_map": CODE}, r"says 'mine'"),
    "an unknown type": ({"model_type": "bert"}, r"a model of type beit, bit, .* says 'bert'\)\. Bring it by a script"),
    "no type": ({"model_type": None}, r"says 'None'"),
    "a type that is a list": ({"model_type": ["vit"]}, r"says \"\['vit'\]\""),
    "a type that is a path": ({"model_type": "../vit"}, r"says '\.\./vit'"),
    "a module as its type": ({"model_type": "vit.modeling_vit:os"}, r"says 'vit\.modeling"),
    "a wrapper of timm's": ({"model_type": "timm_wrapper"}, r"It is timm's: model=timm model\.name=hf_hub:/"),
    "patches of any size": ({"model_type": "siglip2"}, r"Choose one of a fixed resolution"),
    "a type within": ({"model_type": "clip", "vision_config": {"model_type": "mine"}}, r"whose weights fit CLIPForIm"),
    "no tower": ({"model_type": "clip", "vision_config": [1]}, r"vision_config is no object"),
    "a quantization": ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"one without quantization_config"),
    "a regression": ({"problem_type": "regression"}, r"its numbers are no logits"),
    "a huge size": ({"hidden_size": 10**9}, r"hidden_size is beyond 16384"),
    "a huge number": ({"layer_norm_eps": 10**400}, r"layer_norm_eps is beyond"),
    "no end of layers": ({"num_hidden_layers": 16_000}, r"more than 5,000 layers"),
    "no end of outputs": ({"id2label": {"0": "a", "2": "b"}}, r"id2label numbers its classes from 0"),
    "outputs of no names": ({"id2label": ["a"]}, r"id2label numbers its classes from 0"),
    "no outputs": ({"id2label": {}}, r"id2label numbers its classes from 0"),
    "a text for a number": ({"hidden_size": "24"}, r"config\.json suits ViTForImageClassification, got .*hidden_size"),
    "an object for a number": ({"hidden_size": {"a": 1}}, r"hidden_size is an object"),
    "a list for a number": ({"num_hidden_layers": [2]}, r"config\.json suits"),
    "nothing for a number": ({"hidden_size": None}, r"config\.json suits"),
    "a number below zero": ({"hidden_size": -24}, r"config\.json suits"),
    "zero": ({"patch_size": 0}, r"config\.json suits"),
    "an odd number of heads": ({"num_attention_heads": 5}, r"weights fit ViTForImageClassification"),
    "an activation that is no function": ({"hidden_act": "os.system"}, r"config\.json suits .*KeyError"),
    "deep lists": ({"image_size": [[[[64]]]]}, r"image_size nests too deep"),
    "long lists": ({"image_size": [64] * 300}, r"too long"),
    "another width": ({"hidden_size": 48}, r"weights fit ViTForImageClassification, got .*of another shape: .*\(24,\)"),
    "more layers": ({"num_hidden_layers": 3}, r"missing: vit\..*, \.\.\. of 16\)\. Load it by a script"),
    "fewer layers": ({"num_hidden_layers": 1}, r"unexpected: vit\.layers\.1\."),
    "another number of classes": ({"id2label": {"0": "a"}}, r"of another shape: classifier\.bias"),
}


@pytest.mark.parametrize(("changes", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_one_line(changes: dict[str, Any], said: str, folder: Path, world: World) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    change(folder / "config.json", lambda values: values.update(changes))
    assert re.search(said, refusal(folder, world))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 16_000, "num_hidden_layers": 100}, {"image_size": 16_000, "patch_size": 1}], ids=str
)
def test_a_model_beyond_memory_is_refused_before_it_is_built(
    changes: dict[str, Any], folder: Path, world: World
) -> None:
    change(folder / "config.json", lambda values: values.update(changes))
    with pytest.raises(OutOfMemoryError, match=r"^model\.name must fit into memory, got .*: it takes [0-9.]+ GiB of"):
        load(folder, world)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"model_type": "vit", "model_type": "bert"}', '{"hidden_size": NaN}', '{"a": ' * 10_000, "\0"],
    ids=["empty", "a list", "cut off", "a key twice", "NaN", "deep", "binary"],
)
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_a_file_that_is_no_json_object_is_one_line(text: str, file: str, folder: Path, world: World) -> None:
    (folder / WEIGHTS).unlink()
    (folder / file).write_text(text)
    assert "whose JSON files hold an object" in refusal(folder, world)


def test_what_a_config_asks_for_beside_its_settings_is_not_done(folder: Path, world: World) -> None:
    asked = {
        "_attn_implementation": "kernels-community/flash-attn",
        "_attn_implementation_internal": "kernels-community/flash-attn",
        "attn_implementation": "kernels-community/flash-attn",
        "use_kernels": True,
        "trust_remote_code": True,
        "_name_or_path": "someone/else",
        "_commit_hash": "main",
        "return_dict": False,
        "output_hidden_states": True,
        "torch_dtype": "float16",
        "dtype": "__loader__",
        "chunk_size_feed_forward": 7,
        "architectures": ["os.system", "SomethingForImageClassification"],
        "custom_pipelines": {"x": {"impl": "code.P"}},
        "transformers_version": "9.9",
        "finetuning_task": "image-classification",
        "pruned_heads": {"0": [1]},
    }
    plain = load(folder, world).module.eval()
    change(folder / "config.json", lambda values: values.update(asked))
    model = load(folder, world)
    network: Any = model.module.network
    assert network.config._attn_implementation == "sdpa"
    assert {each.dtype for each in network.parameters()} == {torch.float32}
    images = noise(SIDE, SIDE)
    with torch.inference_mode():
        assert torch.equal(model.module.eval()(images), plain(images))


WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00002.safetensors"


def in_shards(folder: Path, *names: Any) -> None:
    """Split the weights into files of these names, with an index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {key: names[i % len(names)] for i, key in enumerate(state)} if names else {}
    for name in {name for name in names if isinstance(name, str) and "/" not in name}:
        save_file({key: value for key, value in state.items() if places[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_weights_in_shards_are_read(folder: Path, world: World) -> None:
    whole = load(folder, world)
    in_shards(folder, SHARD, SHARD.replace("1-of", "2-of"))
    assert weights_digest(load(folder, world).module) == weights_digest(whole.module)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((SHARD, "../other.safetensors"), "whose files lie side by side, .* names '../other.safetensors'"),
        ((SHARD, "/etc/passwd"), "it names '/etc/passwd'"),
        ((SHARD, "pytorch_model.bin"), "it names 'pytorch_model.bin'"),
        ((SHARD, 7), "it names '7'"),
        ((SHARD, ["a"]), r"""it names "\['a'\]\""""),
        ((), "it names 'nothing'"),
        ((SHARD, "/missing.safetensors"), "it names '/missing.safetensors'"),
    ],
    ids=str,
)
def test_shards_are_safetensors_beside_their_index(
    names: tuple[Any, ...], said: str, folder: Path, world: World
) -> None:
    in_shards(folder, *names)
    assert re.search(said, refusal(folder, world))


def test_shards_are_found_in_a_cache_that_has_no_network(
    folder: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards(folder, SHARD, SHARD.replace("1-of", "2-of"))
    (tmp_path / "hub" / "org").mkdir(parents=True)
    (tmp_path / "hub" / "org" / "vit").symlink_to(folder)
    constants = huggingface_hub.constants
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        fetched = load(Path("org/vit"), world)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = load(Path("org/vit"), world)
    assert fetched.weights == again.weights == f"org/vit@{COMMIT}"
    assert weights_digest(fetched.module) == weights_digest(again.module)


def half(state: dict[str, torch.Tensor]) -> None:
    state |= {key: value.half() for key, value in state.items()}


def test_half_precision_in_a_file_is_read_as_fp32(folder: Path, world: World) -> None:
    state = load_file(folder / WEIGHTS)
    half(state)
    save_file(state, folder / WEIGHTS)
    assert {each.dtype for each in load(folder, world).module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda state: state.pop("classifier.weight"), r"missing: classifier\.weight"),
        (lambda state: state.update(extra=torch.ones(1)), r"unexpected: extra"),
        (
            lambda state: state.update({"classifier.weight": state["classifier.weight"].char()}),
            r"of another type: classifier\.weight torch\.int8",
        ),
        (lambda state: state.clear(), r"missing: "),
    ],
    ids=["no head", "a key too many", "codes", "empty"],
)
def test_weights_that_do_not_fit_are_one_line(
    changes: Callable[[dict[str, torch.Tensor]], object], said: str, folder: Path, world: World
) -> None:
    state = load_file(folder / WEIGHTS)
    changes(state)
    save_file(state, folder / WEIGHTS)
    assert re.search(f"must be one whose weights fit ViTForImageClassification, got .*{said}", refusal(folder, world))


def test_without_safetensors_one_line_says_what_to_do(folder: Path, world: World, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "it has no model.safetensors" in refusal(folder, world)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert re.search(
        r"it has pytorch_model\.bin alone\)\. Download it, convert it by python -c", refusal(folder, world)
    )


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      "], ids=["empty", "size", "none"]
)
def test_weights_that_are_no_safetensors_are_one_line(content: bytes, folder: Path, world: World) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert re.search(r"whose (safetensors can be read|weights fit)", refusal(folder, world))


def test_links_and_devices_for_files_are_one_line(folder: Path, world: World) -> None:
    for file in ("config.json", WEIGHTS):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        (folder / file).symlink_to("/dev/zero")
        assert "not a regular file" in refusal(folder, world)
        (folder / file).unlink()
        (folder / file).write_bytes(content)


def test_a_repository_of_a_tokenizer_is_one_line(folder: Path, world: World) -> None:
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    assert "must be one of a model, got" in refusal(folder, world)
    assert "must be a folder, got" in refusal(folder / "missing", world)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_processor_type": "CustomImageProcessor"}, r"its processor is CustomImageProcessor"),
        ({"image_processor_type": "os.systemImageProcessor"}, r"its processor is os\.system"),
        ({"image_processor_type": 7}, r"its processor is 7"),
        ({"do_resize": False}, r"it does not resize"),
        ({"size": {"shortest_edge": 64}}, r"it resizes the shorter side and does not crop"),
        ({"size": {"height": 64, "width": 48}}, r"its images are 64x48, no square"),
        ({"size": {"longest_edge": 64}}, r"its size is"),
        ({"size": {"height": 10**6, "width": 10**6}}, r"it resizes to 1000000"),
        ({"size": "a"}, r"got .* a\)\. Say it by"),
        ({"resample": 5}, r"it resamples by 5"),
        ({"do_pad": True}, r"it pads"),
        ({"image_std": [0, 0, 0]}, r"its mean and std are"),
        ({"image_mean": [0.5]}, r"Error|its mean and std are"),
        ({"do_center_crop": True, "crop_size": 65}, r"it crops 65 of 64"),
    ],
    ids=str,
)
def test_images_prepared_otherwise_are_one_line_unless_the_user_says_how(
    changes: dict[str, Any], said: str, folder: Path, world: World
) -> None:
    change(folder / "preprocessor_config.json", lambda values: values.update(changes))
    text = refusal(folder, world)
    assert re.search(said, text)
    assert text.endswith(
        "Say it by transform=imagenet or transform.* (docs/data.md), or a script of yours (docs/own.md)."
    )
    assert load(folder, world, resize=[SIDE, SIDE], crop=None).preset is None


def test_files_of_older_releases_are_read(folder: Path, world: World) -> None:
    wanted = load(folder, world).preset
    images = folder / "preprocessor_config.json"
    for older in ({"feature_extractor_type": "ViTFeatureExtractor"}, {}):
        images.write_text(json.dumps({"size": SIDE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | older))
        assert load(folder, world).preset == wanted


def test_two_classifiers_have_no_one_embedding(tmp_path: Path, world: World) -> None:
    save_model(tmp_path, *OF_TWO[0])
    config = replace(job(tmp_path, name="plain"), output=OutputConfig(fields=["embedding"]))
    with pytest.raises(UsageError, match=r"^output\.fields must be without embedding for a model of two classifiers"):
        load_model(config, Script(), world)


def test_a_row_keeps_its_bits_whatever_stands_beside_it(folder: Path, world: World) -> None:
    module, images = load(folder, world).module.eval(), noise(SIDE, SIDE)
    with torch.inference_mode():
        first = module(images)[:1]
        images[1] = 0
        assert torch.equal(module(images)[:1], first)


def test_names_of_classes_are_printable_and_those_of_the_config(folder: Path, world: World) -> None:
    names = {"0": "tench, Tinca tinca", "1": " two\nlines ", "2": "", "3": "\ud800", "4": 4}
    change(folder / "config.json", lambda values: values.update(id2label=names))
    assert load(folder, world).class_names == ("tench, Tinca tinca", "two lines", "class 2", "class 3", "4")


def test_settings_that_weights_do_not_show_are_another_model(folder: Path, world: World) -> None:
    before = load(folder, world)
    change(folder / "config.json", lambda values: values.update(layer_norm_eps=0.1))
    after = load(folder, world)
    assert before.identity != after.identity
    assert weights_digest(before.module) == weights_digest(after.module)


@pytest.mark.parametrize(
    ("status", "changes", "said"),
    [
        (200, lambda folder: (folder / "config.json").unlink(), "must be one of a model"),
        (200, lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "pytorch_model.bin alone"),
        (401, lambda folder: None, "must be a repository at"),
        (403, lambda folder: None, "must be a repository that you may read"),
        (500, lambda folder: None, "must be on this machine or reachable"),
    ],
)
def test_a_hub_that_does_not_give_a_model_is_one_line(
    status: int,
    changes: Callable[[Path], object],
    said: str,
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "hub" / "org" / "vit"
    save_model(folder, "vit", "ViTForImageClassification")
    processor_of("vit")(size=SIDE).save_pretrained(folder)
    changes(folder)
    with serve(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        hub.status = status
        assert said in refusal(Path("org/vit"), world)
        if status == 200:
            assert "must be a repository at" in refusal(Path("org/none"), world)
            asked = [file for file in hub.asked if file.startswith("org/vit/")]
            assert not any(file.endswith((".py", ".bin")) and asked.count(file) > 1 for file in asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in refusal(Path("org/none"), world)


def test_a_repository_that_is_taken_for_torchvisions_is_told() -> None:
    config = Config(data=FolderConfig(root="."), transform=TransformConfig(), model=ModelConfig(name="org/vit"))
    with pytest.raises(UsageError, match=r"got 'org/vit'\. For a repository .* \(model=hf model\.name=org/vit\)\.$"):
        build_model(config)


def test_a_size_that_a_model_does_not_take_is_one_line(folder: Path, world: World) -> None:
    config = job(folder, size=32)
    model = load(folder, world)
    with pytest.raises(UsageError, match=rf"^transform\.size must be a size that .* takes, got 32 .* Try .*={SIDE}\.$"):
        try_size(model, config, choose_transform(config, model))
    try_size(model, job(folder), choose_transform(job(folder), model))
