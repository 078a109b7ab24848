"""The schema: every key of the command line, with its default, its documentation and its rule.

A section checks itself when it is built, so a `Config` that exists is one whose values make sense on their own.
What needs the machine (devices, folders, model names) is checked by whoever needs it.
"""

import inspect
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.checks import protocol_of, require, words_of
from mgpu_ddp.config.keys import (
    Key,
    Rule,
    Section,
    absolute,
    at_least,
    each_of,
    key,
    keys_of,
    location,
    not_empty,
    one_of,
)
from mgpu_ddp.config.script import ITSELF
from mgpu_ddp.errors import UsageError

A_DAY_S = 86_400
AUTO = "auto"
FILE_OR_NULL = not_empty("null or a file", "Leave it out for null.")
CLASS_NAMES = "A file that names the classes in the model's order: a text of one name a line, or a .json list."


class DataConfig(Section):
    """A source of images."""

    __slots__ = ()
    prefix = "data."


def _image_size(key: Key, size: list[int]) -> list[int]:
    ok = len(size) == 3 and size[0] in (1, 3) and min(size) >= 1
    rule = "[channels, height, width] with 1 or 3 channels"
    key.require(ok, rule, list(size), f"Try {key.name}=[3,224,224].")
    return size


@dataclass(kw_only=True, slots=True)
class FakeConfig(DataConfig):
    """torchvision's FakeData: random images, the same ones for the same settings."""

    name: str = "fake"
    size: int = key(1000, "Number of images.", at_least(0))
    image_size: list[int] = key([3, 224, 224], "Channels (1 or 3), height and width of each image.", _image_size)
    num_classes: int = key(10, "Labels are drawn from this many classes.", at_least(1))
    random_offset: int = key(0, "Added to the index to seed each image.", at_least(0))


def _extensions(key: Key, extensions: list[str]) -> list[str]:
    return [extension.lower().removeprefix(".") for extension in extensions]


def _each_once(key: Key, names: list[str]) -> list[str]:
    key.require(len(set(names)) == len(names), "names of columns, each once", list(names), "Leave the others out.")
    return list(names)


CARRY = (
    "Columns that are copied into the rows: [id,url]. One that is called as a column of ours gets source_ before its"
    " name."
)
CHECK = (
    "How a later start finds images that were replaced, which it predicts again. stat: by size and modification time."
    " hash: by their content, for which each start reads all of them. name: not at all. auto: stat for files, name for"
    " URLs."
)
CHECKS = one_of("auto", "name", "stat", "hash")


def _check_content(check: str, root: str) -> None:
    fits = check in ("auto", "name") or not protocol_of(root)
    require(fits, "data.check", "name or auto for URLs", check, "Leave it out.")


@dataclass(kw_only=True, slots=True)
class FolderConfig(DataConfig):
    """Every image under a folder, recursively, sorted by the bytes of its relative path."""

    name: str = "folder"
    root: str = key(
        MISSING,
        "The folder, or the URL of one: s3://BUCKET/PREFIX, gs://, hf://, https:// (extra [cloud]).",
        location("a folder", "Give data.root=DIR."),
        path=True,
    )
    follow_outside: bool = key(False, "Also follow symbolic links that lead out of the root.")
    extensions: list[str] = key(
        [],
        "Which files are images, by the end of their name: [jpg,png]; '' is a name without extension. []: all formats"
        " that can be read.",
        _extensions,
    )
    check: str = key("auto", CHECK, CHECKS)

    def check_together(self) -> None:
        _check_content(self.check, self.root)


def _box_columns(key: Key, value: Any) -> list[str] | None:
    names = value if isinstance(value, list) or value is None else [value]
    ok = names is None or (
        len(names) == len({*map(str, names)}) in (1, 4) and all(isinstance(name, str) and name for name in names)
    )
    key.require(ok, "the name of one column or of four, or null", value, f"Try {key.name}=[x0,y0,x1,y1].")
    return names


BOXES = (
    "The column of boxes, {forms}, or the four columns [x0,y0,x1,y1]. Each box gets a row, and its crop is the sample;"
    " in pixels of the upright image, of which x1 and y1 are the first outside. null: whole images."
)


@dataclass(kw_only=True, slots=True)
class ListConfig(DataConfig):
    """The images that a file names, in its order; one that is named twice gets two rows."""

    name: str = "list"
    path: str = key(
        MISSING,
        "The list, a path or a URL: .csv or .parquet with a column path and maybe a column label (numbers or names), or"
        " a text of one path or URL a line.",
        location("a file", "Give data.path=FILE.csv."),
        path=True,
    )
    root: str | None = key(None, "Where relative paths begin. null: the folder of data.path.", path=True)
    extensions: list[str] = key(
        [], "Which of the files are taken, by the end of their name: [jpg,png]. []: all of them.", _extensions
    )
    carry: list[str] = key([], CARRY, _each_once)
    check: str = key("auto", CHECK, CHECKS)
    box_column: Any = key(None, BOXES.format(forms="JSON as [[x0,y0,x1,y1],...], or lists in Parquet"), _box_columns)

    def check_together(self) -> None:
        self.root = absolute(keys_of(ListConfig)["root"], self.root or os.path.dirname(self.path))
        _check_content(self.check, self.root)


CHECK_ARCHIVES = (
    "What becomes of committed rows when their file has changed between two starts. name: they stay. stat: all rows of"
    " such a file are predicted again."
)
PATTERN = location("a pattern of files", "Give data.urls='photos/*.tar'.")


def _extension(key: Key, extension: str | None) -> str | None:
    return extension and extension.lower().removeprefix(".")


@dataclass(kw_only=True, slots=True)
class WebDatasetConfig(DataConfig):
    """The images in tar files, in their order; the row's path is tar/member."""

    name: str = "webdataset"
    urls: str = key(
        MISSING,
        "The tars, as a pattern of paths or URLs with braces or *, quoted for the shell:"
        " 'data.urls=tars/train-{0000..0127}.tar'.",
        PATTERN,
        path=True,
    )
    check: str = key("name", CHECK_ARCHIVES, one_of("name", "stat"))
    extensions: list[str] = key(
        [],
        "Which members are images, by what follows the first dot of their name: [jpg], or [left.jpg] where a sample"
        " has several. Each gets a row. []: every member whose name ends as an image's does.",
        _extensions,
    )
    label_extension: str | None = key(
        None, "Members that hold the class of their sample as a whole number: cls. null: no labels.", _extension
    )


@dataclass(kw_only=True, slots=True)
class ParquetConfig(DataConfig):
    """The images in a column of Parquet files, in their order."""

    name: str = "parquet"
    urls: str = key(
        MISSING,
        "The files, as a pattern of paths or URLs with braces or *, quoted for the shell:"
        " 'data.urls=photos/*.parquet'.",
        PATTERN,
        path=True,
    )
    check: str = key("name", CHECK_ARCHIVES, one_of("name", "stat"))
    column: str = key(
        "image",
        "The column of encoded images: bytes, or a struct of bytes and path as Hugging Face datasets have it.",
        not_empty("the name of a column", "Leave it out for image."),
    )
    label_column: str | None = key(None, "The column of classes, as numbers or names. null: no labels.")
    key_column: str | None = key(
        None,
        "The column that becomes the row's path: text, bytes or whole numbers; image.path is that of a struct. null:"
        " file/row number.",
    )
    carry: list[str] = key([], CARRY, _each_once)
    box_column: Any = key(None, BOXES.format(forms="lists of x0, y0, x1, y1"), _box_columns)


def _mapped(key: Key, path: str) -> str:
    key.require(bool(path), "a file", path, "Give data.path=FILE.npy.")
    rule = "a file of a file system, which can be mapped into memory"
    key.require(not protocol_of(path), rule, path, "Copy or mount it.")
    return absolute(key, path)


@dataclass(kw_only=True, slots=True)
class ArrayConfig(DataConfig):
    """Images that were decoded before: one .npy of uint8, mapped into memory."""

    name: str = "array"
    path: str = key(MISSING, "The .npy, (n, height, width, 3) or (n, 3, height, width).", _mapped, path=True)


@dataclass(kw_only=True, slots=True)
class ScriptDataConfig(DataConfig):
    """The dataset that the script brings."""

    name: str = ITSELF


Listed = FolderConfig | ListConfig | WebDatasetConfig | ParquetConfig
"""The data that come as encoded images with names."""


AUTO = "auto"


def _per_channel(low: float) -> Rule:
    """Three numbers from `low` to 1, or one for all channels; kept as three."""

    def check(key: Key, value: Any) -> Any:
        if value == AUTO:
            return value
        numbers = value if isinstance(value, list) else [value] * 3
        rule = f"three numbers from {low:g} to 1, or one for all channels"
        remedy = "Give those for levels of 0 to 255 divided by 255."
        ok = len(numbers) == 3 and all(type(number) in (int, float) and low <= number <= 1 for number in numbers)
        key.require(ok, rule, value, remedy)
        return [float(number) for number in numbers]

    return check


def _pixels(*, null: bool = False) -> Rule:
    """A whole number, or a height and a width; None where it may be."""

    def check(key: Key, value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value]
        ok = len(numbers) in (1, 2) and all(type(number) is int and number >= 1 for number in numbers)
        rule = f"one whole number or [height,width], each at least 1,{' null' if null else ''} or auto"
        key.require(ok or value == AUTO or (null and value is None), rule, value, f"Try {key.name}=[256,128].")
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    return check


@dataclass(kw_only=True, slots=True)
class TransformConfig(Section):
    """How an image becomes model input. Keys below `size` replace what the named transform says, one by one."""

    prefix: ClassVar[str] = "transform."

    name: str = key(
        "auto",
        "plain: Resize((size, size)) and ToTensor, the tutorial's. imagenet: resize to size*256/224, centre crop to"
        " size, normalise. auto: plain for fake data; elsewhere the named weights' own transform, or imagenet, of"
        " which an array whose images have the model's size already gets the normalising alone.",
        one_of("auto", "plain", "imagenet", ITSELF),
    )
    size: int = key(
        224,
        "Side of the square the model sees, in pixels. 224 leaves named weights and timm's models their own size; any"
        " other overrides it.",
        at_least(1),
    )
    resize: Any = key(
        AUTO,
        "One number resizes the shorter side to it, [height,width] both sides. auto: as the transform that is named"
        " above, or the weights' own.",
        _pixels(),
    )
    crop: Any = key(
        AUTO,
        "The centre that is cut out of the resized image: one number for a square, or [height,width]. null: nothing is"
        " cut off. auto: as for transform.resize.",
        _pixels(null=True),
    )
    interpolation: str = key(
        AUTO,
        "nearest, bilinear, bicubic or lanczos, as Pillow resizes (it always smooths when it shrinks, except for"
        " nearest). auto: as for transform.resize.",
        one_of(AUTO, "nearest", "bilinear", "bicubic", "lanczos"),
    )
    mean: Any = key(
        AUTO,
        "Subtracted from values of 0 to 1: [red,green,blue], or one number for all; 0 with transform.std=1 leaves them"
        " alone. auto: as for transform.resize.",
        _per_channel(0),
    )
    std: Any = key(
        AUTO, "What is left is divided by: as transform.mean. auto: as for transform.resize.", _per_channel(1e-6)
    )

    @property
    def given(self) -> dict[str, Any]:
        """The keys that replace something of the named transform, as it calls them."""
        names = ("resize", "crop", "interpolation", "mean", "std")
        return {name: getattr(self, name) for name in names if getattr(self, name) != AUTO}

    def size_key(self, *, cropped: bool) -> str:
        """The key that decides how large the model input is; `cropped`: the image is cut in the end."""
        if self.crop not in (AUTO, None):
            return "transform.crop"
        return "transform.size" if cropped or self.resize == AUTO else "transform.resize"


ZERO_SHOT = (
    "A .safetensors of class embeddings and names, which the text tower of a CLIP made: the logits are scaled cosines"
    " of the model's features. null: the model's own classes."
)


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section):
    prefix: ClassVar[str] = "model."

    name: str = key("resnet18", "Any torchvision classification model.")
    weights: str | None = key(
        AUTO,
        "auto: DEFAULT, or null for data=fake; a run folder keeps its own. null: random, from `seed`. DEFAULT or a"
        " torchvision weights name: downloaded once. A path ending in .pt, .pth, .pth.tar, .ckpt, .bin or"
        " .safetensors: a checkpoint.",
        not_empty("auto, null, a name or a path", "Leave it out for auto."),
        path=True,
    )
    num_classes: int | None = key(
        None,
        "Number of classes of the last layer; one is a probability of its own, by the sigmoid. null: those of the"
        " weights, 1000 where they are random.",
        at_least(1, example=1000),
    )
    class_names: str | None = key(
        None,
        f"{CLASS_NAMES} null: the weights' own names, where they have any.",
        FILE_OR_NULL,
        path=True,
    )
    zero_shot: str | None = key(None, ZERO_SHOT, FILE_OR_NULL, path=True)


FOLDER = "local-dir:"
"""Before a folder, in timm's own words."""


def _timm_name(key: Key, name: str) -> str:
    return FOLDER + absolute(key, name.removeprefix(FOLDER)) if name.startswith(FOLDER) else name


@dataclass(kw_only=True, slots=True)
class TimmConfig(ModelConfig):
    name: str = key(
        MISSING,
        "Any timm model that takes a square image, cropped or squashed, with its own transform; model.weights=DEFAULT"
        " takes its weights from the Hugging Face hub. hf_hub:ORG/REPO, or hf_hub:ORG/REPO@REVISION, is a fine-tune"
        " there, and local-dir:DIR a folder of the files of one.",
        _timm_name,
    )


@dataclass(kw_only=True, slots=True)
class PluginConfig(Section):
    """A model that an installed package offers."""

    prefix: ClassVar[str] = "model."

    name: str = key(MISSING, "The name of a model that an installed package offers (docs/own.md).")
    class_names: str | None = key(None, CLASS_NAMES, FILE_OR_NULL, path=True)


@dataclass(kw_only=True, slots=True)
class HfConfig(Section):
    """A model of transformers, from the Hugging Face hub or a folder."""

    prefix: ClassVar[str] = "model."

    name: str = key(
        MISSING,
        "ORG/REPO or ORG/REPO@REVISION of the hub, or a folder with the files of one: config.json,"
        " preprocessor_config.json and safetensors. An image classifier gives classes, any other model embeddings.",
        not_empty("ORG/REPO or a folder", "Try model.name=google/vit-base-patch16-224."),
        path=True,
    )
    class_names: str | None = key(
        None,
        f"{CLASS_NAMES} null: those of config.json.",
        FILE_OR_NULL,
        path=True,
    )
    zero_shot: str | None = key(None, ZERO_SHOT, FILE_OR_NULL, path=True)


@dataclass(kw_only=True, slots=True)
class ScriptModelConfig(Section):
    """The model that the script brings."""

    prefix: ClassVar[str] = "model."

    name: str = ITSELF
    class_names: str | None = key(None, CLASS_NAMES, FILE_OR_NULL, path=True)


@dataclass(kw_only=True, slots=True)
class RuntimeConfig(Section):
    """Device, precision and how the model runs."""

    prefix: ClassVar[str] = "runtime."

    device: str = key("auto", "auto, cpu or cuda. auto takes CUDA where there is one.", one_of("auto", "cpu", "cuda"))
    precision: str = key(
        "auto",
        "auto, fp32, tf32, bf16 or fp16. auto is fp32 on the CPU and fp16 on CUDA.",
        one_of("auto", "fp32", "tf32", "bf16", "fp16"),
    )
    channels_last: bool = key(True, "Keep images and weights in the channels-last memory format.")
    fold: bool = key(True, "Fold each batch norm into the convolution before it.")
    deterministic: bool = key(
        True,
        "Same bits at any world size and after any resume. false lets cuDNN time its kernels and take the fastest.",
    )
    compile: str = key(
        "auto",
        "auto, on or off: torch.compile. auto is on where a job is long enough to win back the time that it takes: on"
        " CPUs from 10^15 floating-point operations (ResNet18 over 280,000 images), which gain up to a sixth by it; on"
        " GPUs in half precision for Swin (from 860,000 images on one H200), ConvNeXt and EfficientNetV2, sooner where"
        " Inductor's cache has it already. It is off for other models (on a GPU ResNets gain next to nothing, and ViTs"
        " lose a tenth), with shard, with batch_size=auto, with strategy=data_parallel and where compiling fails. A run"
        " folder keeps what was chosen.",
        one_of("auto", "on", "off"),
    )
    decode: str = key(
        "auto",
        "Where JPEGs are decoded: gpu (fastest; what it cannot decode goes to the CPU), exact (on the GPU, to the very"
        " pixels that the CPU yields; needs one with JPEG engines, such as an H200), cpu (Pillow), scaled (Pillow;"
        " JPEGs come at an eighth, a quarter or a half of their size, where that is no less than what they are resized"
        " to: several times as fast for photos, with other pixels than cpu). auto: gpu on CUDA, else cpu.",
        one_of("auto", "gpu", "exact", "cpu", "scaled"),
    )
    profile: bool = key(
        False,
        "Write a torch.profiler trace of about 20 batches of each rank to RUN/profile, for https://ui.perfetto.dev.",
    )
    on_oom: str = key(
        "auto",
        "split: a batch that does not fit into memory is predicted in halves, and its rows are marked. raise: it ends"
        " the job. auto: split, in a sweep raise.",
        one_of("auto", "split", "raise"),
    )


@dataclass(kw_only=True, slots=True)
class LoaderConfig(Section):
    """Reading and decoding."""

    prefix: ClassVar[str] = "loader."

    workers: int | str = key(
        "auto",
        "Loader processes per rank. auto: the CPUs this process may use, shared among the ranks of its host. 0 loads in"
        " the rank's own process.",
        at_least(0, word="auto", example=4),
    )
    prefetch: int = key(2, "Batches each worker keeps ready.", at_least(1))
    timeout_s: float = key(
        120.0,
        "A sample that takes longer than this many seconds becomes an error row.",
        at_least(0.1, high=A_DAY_S),
    )
    max_pixels: int = key(
        178_956_970,
        "An image of more pixels becomes an error row: it may be a decompression bomb.",
        at_least(1),
    )
    block: int = key(
        1,
        "Consecutive samples that go to one rank; 1 is DistributedSampler's own rule. Tars and Parquet want several row"
        " groups or hundreds of images, so that a rank reads long ranges. Windows hold whole blocks of all ranks. With"
        " data.box_column 1 stands for whole batches of 256 boxes or more: those of an image stay together.",
        at_least(1, high=1_000_000),
    )


def _folder(key: Key, folder: str | None) -> str | None:
    rule = "a folder of a file system: object stores cannot rename, which makes a part appear whole or not at all"
    key.require("://" not in (folder or ""), rule, folder, "Write to a disk, and copy it afterwards.")
    return folder and os.path.expanduser(folder)


WIDE = ("logits", "probs", "embedding")
"""The fields that are long lists of numbers."""


@dataclass(kw_only=True, slots=True)
class OutputConfig(Section):
    """The written result: columns, format, folder, and how often rows become durable."""

    prefix: ClassVar[str] = "output."

    dir: str | None = key(None, "The run folder. null: Hydra's run dir.", _folder, path=True)
    format: str = key(
        "parquet",
        "parquet, csv, jsonl or npy: one array of logits, (samples, classes), or of output.fields=[embedding].",
        one_of("parquet", "csv", "jsonl", "npy"),
    )
    topk: int = key(5, "How many best classes each row names.", at_least(1))
    fields: list[str] = key(
        ["topk"],
        "Any of topk, logits, probs, embedding (pooled features, what the classifier sees), size (width and height of"
        " the upright image file); pred and prob are always there.",
        each_of("topk", *WIDE, "size"),
    )
    dtype: str = key(
        "fp32",
        "fp32 or fp16: of logits, probs and embedding as they are written, to parquet or npy.",
        one_of("fp32", "fp16"),
    )
    collect: str = key(
        "auto",
        "gather: rows travel to rank 0, which writes. shards: each rank writes its own parts. auto: gather for top-k,"
        " shards for wide fields and npy.",
        one_of("auto", "gather", "shards"),
    )
    nonfinite: str = key(
        "record",
        "record: a row whose outputs hold NaN or Inf becomes an error row. raise: it ends the job.",
        one_of("record", "raise"),
    )
    commit_every: int | str = key(
        "auto",
        "Samples of all ranks together that become durable at once. auto aims at about 10 seconds.",
        at_least(1, word="auto", example=10000),
    )

    def check_together(self) -> None:
        fits = self.format != "npy" or self.fields in (["topk"], ["logits"], ["embedding"])
        rule = "[logits] or [embedding] with output.format=npy, which is one array"
        require(fits, "output.fields", rule, list(self.fields), "Leave it out for logits.")
        fits = self.dtype == "fp32" or self.format in ("parquet", "npy")
        rule = "fp32 with output.format=csv or jsonl, which is text"
        require(fits, "output.dtype", rule, self.dtype, "Leave it out.")

    @property
    def array_field(self) -> str:
        """The field that an array holds."""
        return "embedding" if self.fields == ["embedding"] else "logits"

    @property
    def computed(self) -> list[str]:
        """Those of `fields` that the format has room for."""
        return [self.array_field] if self.format == "npy" else self.fields


@dataclass(kw_only=True, slots=True)
class DistConfig(Section):
    """Talk between ranks."""

    prefix: ClassVar[str] = "dist."

    timeout_s: float = key(
        180.0, "Seconds without a heartbeat after which a rank counts as lost.", at_least(2, high=A_DAY_S)
    )


@dataclass(kw_only=True, slots=True)
class SweepConfig(Section):
    """The points of a --multirun."""

    prefix: ClassVar[str] = "sweep."

    repeats: int = key(
        1, "How often a sweep runs each of its points, one round after another.", at_least(1, high=1000, example=3)
    )
    stop_on_oom: bool = key(False, "Skip the points of a sweep whose batch size is above one that ran out of memory.")
    repeat: int = key(1, "The round a job of a sweep belongs to. The sweep sets it.")


def _max_errors(key: Key, value: Any) -> Any:
    value = at_least(0, example="0.01 or max_errors=100")(key, value)
    counts = not isinstance(value, float) or value < 1 or value.is_integer()
    key.require(counts, "a count, or a share below 1", value, f"Try {key.name}=0.01.")
    return value


def _shard(key: Key, text: str | None) -> str | None:
    i, n = parse_shard(text)
    key.require(0 <= i < n, "i/n with 0 <= i < n", text, f"Try {key.name}=0/4.")
    return text


@dataclass(kw_only=True, slots=True)
class Config(Section):
    data: Any = key(MISSING, "What to predict: fake, folder, list, webdataset, parquet or array.")
    transform: Any = key(MISSING, "How an image becomes model input: auto, plain or imagenet.")
    model: Any = key(MISSING, "The model: any torchvision classification model by model.name.")
    batch_size: int | str = key(
        32,
        "Images per step and rank. auto: the smallest that comes within 3 % of the best rate, of those that fit into"
        " memory; found once, before the job's first start. A resumed folder keeps its own unless one is given.",
        at_least(1, word="auto"),
    )
    strategy: str = key(
        "ddp",
        "ddp: one process per GPU. data_parallel: the tutorial's nn.DataParallel in one process.",
        one_of("ddp", "data_parallel"),
    )
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    resume: bool = key(True, "Continue a folder that holds the same job; false refuses it.")
    overwrite: bool = key(False, "Start anew; an older result in the folder stays until the new one is complete.")
    retry_failed: bool = key(False, "Also predict the samples again whose rows are errors.")
    on_error: str = key(
        "record", "record: a bad sample becomes an error row. raise: it ends the job.", one_of("record", "raise")
    )
    max_errors: int | float | None = key(
        None, "Stop after the current window once more samples failed: a count, or a share below 1.", _max_errors
    )
    shard: str | None = key(None, "i/n: this job is number i (from 0) of n contiguous ranges of the samples.", _shard)
    dist: DistConfig = field(default_factory=DistConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = key(0, "Seeds random weights.", at_least(0))
    limit: int | None = key(None, "Only the first so many samples.", at_least(0, example=1000))
    dry_run: bool = key(False, "Print the plan and leave.")

    def check_together(self) -> None:
        carry = getattr(self.data, "carry", [])
        rule = "left out with output.format=npy, which is one array"
        require(not carry or self.output.format != "npy", "data.carry", rule, carry, "Choose parquet, csv or jsonl.")
        fits = "size" not in self.output.fields or isinstance(self.data, Listed)
        rule = "without size where images do not come as files"
        require(fits, "output.fields", rule, list(self.output.fields), "Leave size out.")

    @property
    def boxes(self) -> bool:
        """Samples are boxes of images."""
        return bool(getattr(self.data, "box_column", None))

    @property
    def wide(self) -> bool:
        """Rows carry more than top-k, so that they had better stay on their rank."""
        return self.output.format == "npy" or any(field in WIDE for field in self.output.fields)

    @property
    def collect(self) -> str:
        """`output.collect` with auto decided."""
        return ("shards" if self.wide else "gather") if self.output.collect == "auto" else self.output.collect


def parse_shard(text: str | None) -> tuple[int, int]:
    """Read `i/n`; (0, 1) for None and (-1, 0), which no rule accepts, for anything else."""
    if text is None:
        return 0, 1
    i, slash, n = text.partition("/")
    return (int(i), int(n)) if slash and i.isdecimal() and n.isdecimal() else (-1, 0)


def dataset_range(config: Config, length: int) -> tuple[int, int]:
    """The contiguous range of indices that `limit` and `shard` leave."""
    total = length if config.limit is None else min(length, config.limit)
    i, n = parse_shard(config.shard)
    return total * i // n, total * (i + 1) // n


GROUPS: dict[str, dict[str, Any]] = {
    "data": {
        "fake": FakeConfig,
        "folder": FolderConfig,
        "list": ListConfig,
        "webdataset": WebDatasetConfig,
        "parquet": ParquetConfig,
        "array": ArrayConfig,
        ITSELF: ScriptDataConfig,
    },
    "transform": {name: TransformConfig(name=name) for name in ("auto", "plain", "imagenet", ITSELF)},
    "model": {
        "resnet18": ModelConfig,
        "timm": TimmConfig,
        "hf": HfConfig,
        "plugin": PluginConfig,
        ITSELF: ScriptModelConfig,
    },
}
"""The options of each group, the default first."""
SECTIONS: dict[str, Any] = {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
"""The sections that are no groups."""


def section_of(group: str, option: str) -> type[Section]:
    """The class of an option's keys."""
    node = GROUPS[group][option]
    return cast(type[Section], node if inspect.isclass(node) else type(node))


def num_outcomes(num_classes: int) -> int:
    """How many classes `pred` tells apart: one logit is the score of class 1 against a 0 for class 0."""
    return 2 if num_classes == 1 else num_classes


def pack(config: Config) -> dict[str, Any]:
    """A configuration as JSON values, which `unpack` reads on the other ranks."""
    return {**asdict(config), "schemas": {group: type(getattr(config, group)).__name__ for group in GROUPS}}


def unpack(values: dict[str, Any]) -> Config:
    """The configuration that `pack` wrote."""
    plain = dict(values)
    schemas = dict(SECTIONS)
    for group, name in plain.pop("schemas").items():
        options = (section_of(group, option) for option in GROUPS[group])
        schemas[group] = next(section for section in options if section.__name__ == name)
    return Config(**plain | {group: section(**plain[group]) for group, section in schemas.items()})


def to_config(cfg: DictConfig) -> Config:
    """Turn a composed configuration into validated schema objects.

    Raises:
        UsageError: a value breaks its rule or a mandatory one is missing.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UsageError(f"{missing[0]} must be given, got nothing. Add {missing[0]}=VALUE.")
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        got = words_of(error)
        raise UsageError(f"{error.full_key} must resolve to its type, got: {got}. Write the value out.") from None
    except AttributeError as error:
        # A key put in with + may be one of another option of its group.
        raise UsageError(f"{error.name} must be a key of what was chosen, got another's. See --help.") from None
    assert isinstance(config, Config)
    return config
