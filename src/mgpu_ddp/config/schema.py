"""The schema: every key of the command line, its default, its meaning and its rule.

The docstring under a field is its documentation; `--help` prints these. A schema object validates itself
when it is built, so a `Config` that exists is one whose values make sense on their own. What needs the
machine (devices, folders, model names) is checked by whoever needs it.
"""

import inspect
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgpu_ddp.config.checks import at_least, location, one_of, protocol_of, require
from mgpu_ddp.errors import UsageError

A_DAY_S = 86_400
FIELDS = ("topk", "logits", "probs", "embedding")


@dataclass(kw_only=True, slots=True)
class FakeConfig:
    name: str = "fake"
    """torchvision's FakeData: random images, the same ones for the same settings."""
    size: int = 1000
    """Number of images."""
    image_size: list[int] = field(default_factory=lambda: [3, 224, 224])
    """Channels (1 or 3), height, width of each image."""
    num_classes: int = 10
    """Labels are drawn from this many classes."""
    random_offset: int = 0
    """Added to the index to seed each image."""

    def __post_init__(self) -> None:
        at_least("data.size", self.size, 0, 1000)
        at_least("data.num_classes", self.num_classes, 1, 10)
        at_least("data.random_offset", self.random_offset, 0, 0)
        ok = len(self.image_size) == 3 and self.image_size[0] in (1, 3) and min(self.image_size) >= 1
        rule = "[channels, height, width] with 1 or 3 channels"
        require(ok, "data.image_size", rule, list(self.image_size), "Try data.image_size=[3,224,224].")


@dataclass(kw_only=True, slots=True)
class FolderConfig:
    name: str = "folder"
    """Every image under a folder, recursively, sorted by the bytes of its relative path."""
    root: str = MISSING
    """The folder, or the URL of one: s3://BUCKET/PREFIX, gs://, hf://, https:// (extra [cloud])."""
    follow_outside: bool = False
    """Also follow symbolic links that lead out of the root."""

    def __post_init__(self) -> None:
        require(bool(self.root), "data.root", "a folder", self.root, "Give data.root=DIR.")
        self.root = location("data.root", self.root)


@dataclass(kw_only=True, slots=True)
class ListConfig:
    name: str = "list"
    """The images that a file names, in its order; one that is named twice gets two rows."""
    path: str = MISSING
    """The list: .csv or .parquet with a column path and maybe a column label (whole numbers), or a text of one path
    or URL a line. A path, or a URL."""
    root: str | None = None
    """Where relative paths begin. null: the folder of data.path."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "a file", self.path, "Give data.path=FILE.csv.")
        self.path = location("data.path", self.path)
        self.root = location("data.root", self.root or os.path.dirname(self.path))


@dataclass(kw_only=True, slots=True)
class WebDatasetConfig:
    name: str = "webdataset"
    """The images in tar files, in their order; the row's path is tar/member."""
    urls: str = MISSING
    """The tars, as a pattern of paths or URLs with braces or *, quoted: 'data.urls="tars/train-{0000..0127}.tar"'."""
    extensions: list[str] = field(default_factory=list)
    """Which members are images, by what follows the first dot of their name: [jpg], or [left.jpg] of several in a
    sample. Each gets a row. []: every member whose name ends as an image's does."""
    label_extension: str | None = None
    """Members that hold the class of their sample as a whole number: cls. null: no labels."""

    def __post_init__(self) -> None:
        self.urls = _pattern(self.urls)
        self.extensions = [extension.lower().removeprefix(".") for extension in self.extensions]
        self.label_extension = self.label_extension and self.label_extension.lower().removeprefix(".")


@dataclass(kw_only=True, slots=True)
class ParquetConfig:
    name: str = "parquet"
    """The images in a column of Parquet files, in their order."""
    urls: str = MISSING
    """The files, as a pattern of paths or URLs with braces or *, quoted: 'data.urls="photos/*.parquet"'."""
    column: str = "image"
    """The column of encoded images: bytes, or a struct of bytes and path as Hugging Face datasets have it."""
    label_column: str | None = None
    """The column of classes as whole numbers. null: no labels."""
    key_column: str | None = None
    """The column that becomes the row's path: text, bytes or whole numbers; image.path is that of a struct. null:
    file/row number."""

    def __post_init__(self) -> None:
        self.urls = _pattern(self.urls)
        require(bool(self.column), "data.column", "the name of a column", self.column, "Leave it out for image.")


def _pattern(urls: str) -> str:
    require(bool(urls), "data.urls", "a pattern of files", urls, "Give data.urls='photos/*.tar'.")
    return location("data.urls", urls)


@dataclass(kw_only=True, slots=True)
class ArrayConfig:
    name: str = "array"
    """Images that were decoded before: one .npy of uint8, mapped into memory."""
    path: str = MISSING
    """The .npy, (n, height, width, 3) or (n, 3, height, width)."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.path", "a file", self.path, "Give data.path=FILE.npy.")
        rule = "a file of a file system, which can be mapped into memory"
        require(not protocol_of(self.path), "data.path", rule, self.path, "Copy or mount it.")
        self.path = os.path.abspath(os.path.expanduser(self.path))


Listed = FolderConfig | ListConfig | WebDatasetConfig | ParquetConfig
"""The data that come as encoded images with names."""


@dataclass(kw_only=True, slots=True)
class TransformConfig:
    name: str = "auto"
    """plain: Resize((size, size)) and ToTensor, the tutorial's. imagenet: resize to size*256/224, centre crop
    to size, normalise. auto: plain for fake data; elsewhere the named weights' own transform, or imagenet, of which
    an array whose images have the model's size already gets the normalising alone."""
    size: int = 224
    """Side of the square the model sees, in pixels. 224 leaves named weights and timm's models their own size; any
    other overrides it."""

    def __post_init__(self) -> None:
        one_of("transform.name", self.name, ("auto", "plain", "imagenet"))
        at_least("transform.size", self.size, 1, 224)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    name: str = "resnet18"
    """Any torchvision classification model."""
    weights: str | None = None
    """null: random, from `seed`. DEFAULT or a torchvision weights name: downloaded once. A path ending in
    .pt, .pth or .safetensors: a checkpoint."""
    num_classes: int = 1000
    """Number of classes of the last layer."""
    class_names: str | None = None
    """A file that names the classes in the model's order: a text of one name a line, or a .json list. null: the
    weights' own names, where they have any."""

    def __post_init__(self) -> None:
        at_least("model.num_classes", self.num_classes, 1, 1000)
        require(self.weights != "", "model.weights", "null, a name or a path", "", "Leave it out for null.")
        require(self.class_names != "", "model.class_names", "null or a file", "", "Leave it out for null.")


@dataclass(kw_only=True, slots=True)
class TimmConfig(ModelConfig):
    name: str = MISSING
    """Any timm model that takes a square image, cropped or squashed, with its own transform; model.weights=DEFAULT
    takes its weights from the Hugging Face hub."""


@dataclass(kw_only=True, slots=True)
class RuntimeConfig:
    device: str = "auto"
    """auto, cpu or cuda. auto takes CUDA where there is one."""
    precision: str = "auto"
    """auto, fp32, tf32, bf16 or fp16. auto is fp32 on the CPU and fp16 on CUDA."""
    channels_last: bool = True
    """Keep images and weights in the channels-last memory format."""
    fold: bool = True
    """Fold each batch norm into the convolution before it."""
    deterministic: bool = True
    """Same bits at any world size and after any resume. false lets cuDNN time its kernels and take the fastest, and
    loader workers that would wait for the GPU's JPEG decoder decode some of the images, to slightly other pixels."""
    compile: str = "auto"
    """auto, on or off: torch.compile. auto is on for jobs on CPUs of 10^15 floating-point operations (ResNet18 over
    280,000 images), which gain up to a sixth by it; off on a GPU, with shard, with batch_size=auto, with
    strategy=data_parallel and where compiling fails. On a GPU with large batches ConvNeXts gain a quarter, ResNets
    next to nothing, and ViTs lose a tenth. A run folder keeps what was chosen."""
    decode: str = "auto"
    """Where JPEGs are decoded: gpu (fastest; what it cannot decode goes to the CPU), exact (on the GPU, to the very
    pixels that the CPU yields; takes one with JPEG engines, such as an H200), cpu (Pillow). auto: gpu on CUDA."""
    profile: bool = False
    """Write a torch.profiler trace of about 20 batches of each rank to RUN/profile, for https://ui.perfetto.dev."""
    on_oom: str = "auto"
    """split: a batch that does not fit into memory is predicted in halves, and its rows are marked. raise: it ends
    the job. auto: split, in a sweep raise."""

    def __post_init__(self) -> None:
        one_of("runtime.device", self.device, ("auto", "cpu", "cuda"))
        one_of("runtime.precision", self.precision, ("auto", "fp32", "tf32", "bf16", "fp16"))
        one_of("runtime.compile", self.compile, ("auto", "on", "off"))
        one_of("runtime.decode", self.decode, ("auto", "gpu", "exact", "cpu"))
        one_of("runtime.on_oom", self.on_oom, ("auto", "split", "raise"))


@dataclass(kw_only=True, slots=True)
class LoaderConfig:
    workers: int | str = "auto"
    """Loader processes per rank. auto: the CPUs this process may use, shared among the ranks of its host.
    0 loads in the rank's own process."""
    prefetch: int = 2
    """Batches each worker keeps ready."""
    timeout_s: float = 120.0
    """A sample that takes longer than this many seconds becomes an error row."""
    max_pixels: int = 178_956_970
    """An image of more pixels becomes an error row: it may be a decompression bomb."""
    block: int = 1
    """Consecutive samples that go to one rank; 1 is DistributedSampler's own rule. Tars and Parquet want several
    row groups or hundreds of images, so that a rank reads stretches. Windows hold whole blocks of all ranks."""

    def __post_init__(self) -> None:
        at_least("loader.workers", self.workers, 0, 4, word="auto")
        at_least("loader.prefetch", self.prefetch, 1, 2)
        at_least("loader.timeout_s", self.timeout_s, 0.1, 120, high=A_DAY_S)
        at_least("loader.max_pixels", self.max_pixels, 1, 178_956_970)
        at_least("loader.block", self.block, 1, 1, high=1_000_000)


@dataclass(kw_only=True, slots=True)
class OutputConfig:
    dir: str | None = None
    """The run folder. null: Hydra's run dir."""
    format: str = "parquet"
    """parquet, csv, jsonl or npy: one array of logits, (samples, classes), or of output.fields=[embedding]."""
    topk: int = 5
    """How many best classes each row names."""
    fields: list[str] = field(default_factory=lambda: ["topk"])
    """Any of topk, logits, probs, embedding (pooled features, what the classifier sees); pred and prob are always
    there."""
    dtype: str = "fp32"
    """fp32 or fp16: of logits, probs and embedding as they are written, to parquet or npy."""
    collect: str = "auto"
    """gather: rows travel to rank 0, which writes. shards: each rank writes its own parts. auto: gather for
    top-k, shards for wide fields and npy."""
    nonfinite: str = "record"
    """record: a row whose outputs hold NaN or Inf becomes an error row. raise: it ends the job."""
    commit_every: int | str = "auto"
    """Samples of all ranks together that become durable at once. auto aims at about 10 seconds."""

    def __post_init__(self) -> None:
        rule = "a folder of a file system: object stores cannot rename, which makes a part appear whole or not at all"
        require("://" not in (self.dir or ""), "output.dir", rule, self.dir, "Write to a disk, and copy it afterwards.")
        self.dir = self.dir and os.path.expanduser(self.dir)
        one_of("output.format", self.format, ("parquet", "csv", "jsonl", "npy"))
        one_of("output.collect", self.collect, ("auto", "gather", "shards"))
        one_of("output.nonfinite", self.nonfinite, ("record", "raise"))
        at_least("output.topk", self.topk, 1, 5)
        at_least("output.commit_every", self.commit_every, 1, 10000, word="auto")
        for name in self.fields:
            require(name in FIELDS, "output.fields", f"one of {', '.join(FIELDS)}", name, "Try output.fields=[topk].")
        fits = self.format != "npy" or self.fields in (["topk"], ["logits"], ["embedding"])
        rule = "[logits] or [embedding] with output.format=npy, which is one array"
        require(fits, "output.fields", rule, list(self.fields), "Leave it out for logits.")
        one_of("output.dtype", self.dtype, ("fp32", "fp16"))
        fits = self.dtype == "fp32" or self.format in ("parquet", "npy")
        require(
            fits, "output.dtype", "fp32 with output.format=csv or jsonl, which is text", self.dtype, "Leave it out."
        )

    @property
    def array_field(self) -> str:
        """What an array holds."""
        return "embedding" if self.fields == ["embedding"] else "logits"

    @property
    def computed(self) -> list[str]:
        """What of `fields` goes into the output in its format."""
        return [self.array_field] if self.format == "npy" else self.fields


@dataclass(kw_only=True, slots=True)
class DistConfig:
    timeout_s: float = 180.0
    """Seconds without a heartbeat after which a rank counts as lost."""

    def __post_init__(self) -> None:
        at_least("dist.timeout_s", self.timeout_s, 2, 180, high=A_DAY_S)


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    repeats: int = 1
    """How often a sweep runs each of its points, one round after another."""
    stop_on_oom: bool = False
    """Skip the points of a sweep whose batch size is above one that ran out of memory."""
    repeat: int = 1
    """The round a job of a sweep belongs to. The sweep sets it."""

    def __post_init__(self) -> None:
        at_least("sweep.repeats", self.repeats, 1, 3, high=1000)


@dataclass(kw_only=True, slots=True)
class Config:
    data: Any = MISSING
    """What to predict: fake, folder, list, webdataset, parquet or array."""
    transform: Any = MISSING
    """How an image becomes model input: auto, plain or imagenet."""
    model: Any = MISSING
    """The model: any torchvision classification model by model.name."""
    batch_size: int | str = 32
    """Images per step and rank. auto: the smallest that comes within 3 % of the best rate, of those that fit into
    memory; found once, before the job's first start. A resumed folder keeps its own unless one is given."""
    strategy: str = "ddp"
    """ddp: one process per GPU. data_parallel: the tutorial's nn.DataParallel in one process."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision and how the model runs."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    """Reading and decoding."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """What is written, where and how often."""
    resume: bool = True
    """Continue a folder that holds the same job; false refuses it."""
    overwrite: bool = False
    """Start anew; an older result in the folder stays until the new one is complete."""
    retry_failed: bool = False
    """Also predict the samples again whose rows are errors."""
    on_error: str = "record"
    """record: a bad sample becomes an error row. raise: it ends the job."""
    max_errors: int | float | None = None
    """Stop after the current window once more samples failed: a count, or a share below 1."""
    shard: str | None = None
    """i/n: this job is number i (from 0) of n contiguous ranges of the samples."""
    dist: DistConfig = field(default_factory=DistConfig)
    """Talk between ranks."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """What --multirun does with its points."""
    seed: int = 0
    """Seeds random weights."""
    limit: int | None = None
    """Only the first so many samples."""
    dry_run: bool = False
    """Print the plan and leave."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1, 32, word="auto")
        one_of("strategy", self.strategy, ("ddp", "data_parallel"))
        one_of("on_error", self.on_error, ("record", "raise"))
        at_least("max_errors", self.max_errors, 0, "0.01 or max_errors=100")
        counts = not isinstance(self.max_errors, float) or self.max_errors < 1 or self.max_errors.is_integer()
        require(counts, "max_errors", "a count, or a share below 1", self.max_errors, "Try max_errors=0.01.")
        at_least("limit", self.limit, 0, 1000)
        at_least("seed", self.seed, 0, 0)
        i, n = parse_shard(self.shard)
        require(0 <= i < n, "shard", "i/n with 0 <= i < n", self.shard, "Try shard=0/4.")

    @property
    def wide(self) -> bool:
        """Whether rows carry more than top-k, so that they had better stay on their rank."""
        return self.output.format == "npy" or self.output.fields != ["topk"]

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


GROUPS: dict[str, dict[str, Any]] = {
    "data": {
        "fake": FakeConfig,
        "folder": FolderConfig,
        "list": ListConfig,
        "webdataset": WebDatasetConfig,
        "parquet": ParquetConfig,
        "array": ArrayConfig,
    },
    "transform": {name: TransformConfig(name=name) for name in ("auto", "plain", "imagenet")},
    "model": {"resnet18": ModelConfig, "timm": TimmConfig},
}


def pack(config: Config) -> dict[str, Any]:
    """A configuration as JSON values, which `unpack` reads on the other ranks."""
    return {**asdict(config), "schemas": {group: type(getattr(config, group)).__name__ for group in GROUPS}}


def unpack(values: dict[str, Any]) -> Config:
    """The configuration that `pack` wrote."""
    plain = {key: value for key, value in values.items() if key != "schemas"}
    schemas: dict[str, Any] = {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
    for group, name in values["schemas"].items():
        options = (option if inspect.isclass(option) else type(option) for option in GROUPS[group].values())
        schemas[group] = next(option for option in options if option.__name__ == name)
    return Config(**plain | {key: schema(**plain[key]) for key, schema in schemas.items()})


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
        text = " ".join((error.msg or str(error)).split())
        raise UsageError(f"{error.full_key} must resolve to its type, got: {text}. Write the value out.") from None
    except AttributeError as error:
        # A key put in with + may be one of another option of its group.
        raise UsageError(f"{error.name} must be a key of what was chosen, got another's. See --help.") from None
    assert isinstance(config, Config)
    return config
