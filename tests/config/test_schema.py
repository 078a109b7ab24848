"""The schema: its defaults, its rules, and the documentation of every key."""

import dataclasses
import json
import os
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from mgpu_ddp.config.help import documented_keys, help_text
from mgpu_ddp.config.schema import (
    GROUPS,
    ArrayConfig,
    Config,
    DistConfig,
    FakeConfig,
    FolderConfig,
    ListConfig,
    LoaderConfig,
    ModelConfig,
    OutputConfig,
    ParquetConfig,
    RuntimeConfig,
    SweepConfig,
    TransformConfig,
    WebDatasetConfig,
    pack,
    parse_shard,
    to_config,
    unpack,
)
from mgpu_ddp.errors import UsageError

SCHEMAS: dict[str, Any] = {
    "data": FakeConfig,
    "transform": TransformConfig,
    "model": ModelConfig,
    "runtime": RuntimeConfig,
    "loader": LoaderConfig,
    "output": OutputConfig,
    "dist": DistConfig,
    "sweep": SweepConfig,
}
NAN, INF = float("nan"), float("inf")
SIZES = [0, -1, 1.5, 256.0, True, "256x128", "", [], [0, 8], [8, -8], [8, 8, 8], [8, "8"], [[8, 8]], {"a": 8}, NAN]
"""What is no size."""
NUMBERS = [
    "",
    "0.5",
    None,
    True,
    NAN,
    INF,
    [],
    [0.5, 0.5],
    [0.5] * 4,
    [NAN, 0.5, 0.5],
    [123.675, 116.28, 103.53],
    {},
    10**400,
]
"""What is no number for each channel."""


def build(key: str, value: Any) -> Any:
    """The schema object that holds a key, with that value."""
    group, _, name = key.rpartition(".")
    schema = SCHEMAS[group] if group else Config
    schema = FolderConfig if key == "data.root" else schema
    return schema(**{name: value})


@pytest.mark.parametrize(
    ("key", "rule", "values"),
    [
        ("batch_size", "at least 1", [0, -1]),
        ("strategy", "one of ddp, data_parallel", ["", "dp", "DDP"]),
        ("on_error", "one of record, raise", ["ignore"]),
        ("max_errors", "at least 0", [-1, -0.5, NAN, True]),
        ("max_errors", "a count, or a share below 1", [1.5]),
        ("limit", "at least 0", [-1]),
        ("seed", "at least 0", [-1]),
        ("shard", "i/n with 0 <= i < n", ["", "1", "1/0", "4/4", "-1/4", "a/b", "1/2/3", "0.5/1", "/", " 0/4"]),
        ("data.size", "at least 0", [-1]),
        ("data.num_classes", "at least 1", [0]),
        ("data.random_offset", "at least 0", [-1]),
        ("data.image_size", "[channels, height, width] with 1 or 3 channels", [[], [3, 224], [4, 8, 8], [3, 0, 8]]),
        ("data.root", "a folder", [""]),
        ("transform.name", "one of auto, plain, imagenet", ["crop"]),
        ("transform.size", "at least 1", [0, -224]),
        ("transform.resize", "one whole number or [height,width], each at least 1, or auto", SIZES),
        ("transform.resize", "one whole number or [height,width], each at least 1, or auto", [None]),
        ("transform.crop", "one whole number or [height,width], each at least 1, null or auto", SIZES),
        ("transform.interpolation", "one of auto, nearest, bilinear, bicubic, lanczos", ["", "BICUBIC", "box"]),
        ("transform.mean", "three numbers from 0 to 1, or one for all channels", [*NUMBERS, -0.1]),
        (
            "transform.std",
            "three numbers from 1e-06 to 1, or one for all channels",
            [*NUMBERS, 0, [0.5, 0, 1], 1e-9],
        ),
        ("model.num_classes", "at least 1", [0]),
        ("model.weights", "auto, null, a name or a path", [""]),
        ("runtime.device", "one of auto, cpu, cuda", ["gpu", "cuda:0"]),
        ("runtime.precision", "one of auto, fp32, tf32, bf16, fp16", ["float16"]),
        ("runtime.compile", "one of auto, on, off", ["yes", "true"]),
        ("runtime.decode", "one of auto", ["nvjpeg"]),
        ("loader.workers", "at least 0 or auto", [-1, "four", "4"]),
        ("loader.prefetch", "at least 1", [0]),
        ("loader.timeout_s", "at least 0.1", [0, -1, NAN]),
        ("loader.block", "at least 1", [0, -1]),
        ("output.format", "one of parquet, csv, jsonl, npy", ["json", "Parquet"]),
        ("output.collect", "one of auto, gather, shards", ["all"]),
        ("output.topk", "at least 1", [0]),
        ("output.commit_every", "at least 1 or auto", [0, "often"]),
        ("output.fields", "one of topk, logits, probs, embedding", [["topk", "features"]]),
        ("dist.timeout_s", "at least 2", [1, NAN]),
    ],
)
def test_a_bad_value_is_one_line_with_key_rule_value_and_remedy(key: str, rule: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError) as raised:
            build(key, value)
        text = str(raised.value)
        assert text.startswith(f"{key} must be {rule}"), text
        shown = "features" if key == "output.fields" else value
        assert f", got {shown!r}. " in text
        assert re.search(r"\. (Try|Give|Leave) .+\.$", text), "a remedy"
        assert "\n" not in text


@pytest.mark.parametrize("key", ["loader.timeout_s", "dist.timeout_s"])
@pytest.mark.parametrize("value", [INF, 1e300])
def test_a_timeout_that_no_clock_can_hold_is_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=key):
        build(key, value)


@pytest.mark.parametrize(("key", "value"), [("seed", 2**64), ("data.random_offset", 2**64)])
def test_a_seed_that_torch_cannot_hold_is_refused(key: str, value: int) -> None:
    with pytest.raises(UsageError, match=key):
        build(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 1),
        ("max_errors", 0),
        ("max_errors", 0.01),
        ("max_errors", None),
        ("limit", 0),
        ("shard", "3/4"),
        ("data.size", 0),
        ("data.image_size", [1, 1, 1]),
        ("loader.workers", 0),
        ("loader.workers", "auto"),
        ("output.commit_every", 1),
        ("output.fields", ["logits", "probs", "embedding"]),
        ("output.fields", []),
        ("model.weights", "DEFAULT"),
        ("transform.resize", [1]),
        ("transform.crop", None),
        ("transform.mean", 0),
        ("transform.std", [1, 0.5, 1e-6]),
    ],
)
def test_values_at_the_edge_are_accepted(key: str, value: Any) -> None:
    build(key, value)


def test_defaults_are_the_contracts() -> None:
    defaults = {name: key.default for name, key in documented_keys().items()}
    contract = {
        "data": "fake",
        "data.size": 1000,
        "data.image_size": [3, 224, 224],
        "data.num_classes": 10,
        "data.random_offset": 0,
        "transform.name": "auto",
        "transform.size": 224,
        "model": "resnet18",
        "model.name": "resnet18",
        "model.weights": "auto",
        "model.num_classes": None,
        "batch_size": 32,
        "strategy": "ddp",
        "runtime.device": "auto",
        "runtime.precision": "auto",
        "runtime.compile": "auto",
        "runtime.decode": "auto",
        "loader.workers": "auto",
        "loader.timeout_s": 120,
        "loader.block": 1,
        "output.dir": None,
        "output.format": "parquet",
        "output.topk": 5,
        "output.fields": ["topk"],
        "output.collect": "auto",
        "output.commit_every": "auto",
        "resume": True,
        "overwrite": False,
        "on_error": "record",
        "max_errors": None,
        "shard": None,
        "dist.timeout_s": 180,
        "seed": 0,
        "limit": None,
        "dry_run": False,
    }
    assert {name: defaults[name] for name in contract} == contract


@pytest.mark.parametrize(("schema", "key"), [(OutputConfig, "dir"), (ArrayConfig, "path")])
def test_object_stores_are_refused_with_the_reason_where_files_are_renamed_or_mapped(schema: Any, key: str) -> None:
    with pytest.raises(UsageError, match=rf"^(output|data)\.{key} must be .*, got 's3://bucket/x'\. .*\.$"):
        schema(**{key: "s3://bucket/x"})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"format": "npy", "fields": ["probs"]},
            "output.fields must be [logits] or [embedding] with output.format=npy",
        ),
        ({"format": "npy", "fields": ["logits", "embedding"]}, "output.fields must be [logits] or [embedding]"),
        ({"format": "csv", "dtype": "fp16"}, "output.dtype must be fp32 with output.format=csv or jsonl"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as raised:
        OutputConfig(**values)
    assert str(raised.value).startswith(line)


def test_a_list_begins_in_its_own_folder_unless_told_otherwise() -> None:
    here = os.getcwd()
    assert ListConfig(path="lists/mine.csv").root == f"{here}/lists"
    assert ListConfig(path="s3://bucket/lists/mine.csv").root == "s3://bucket/lists"
    assert ListConfig(path="mine.csv", root="photos").root == f"{here}/photos"


def every_key() -> set[str]:
    """Keys as the schema's fields have them, found without the package's own walk."""
    keys = {field.name for field in dataclasses.fields(Config)} - {"runtime", "loader", "output", "dist", "sweep"}
    for group, schema in [
        *SCHEMAS.items(),
        ("data", FolderConfig),
        *(("data", schema) for schema in (ListConfig, WebDatasetConfig, ParquetConfig)),
        ("data", ArrayConfig),
    ]:
        keys |= {f"{group}.{field.name}" for field in dataclasses.fields(schema)}
    return keys - {"data.name"}


def test_every_key_is_documented_and_in_the_help() -> None:
    keys = documented_keys()
    assert set(keys) == every_key()
    shown = help_text().replace("$$", "$")
    for name, key in keys.items():
        assert len(key.doc) > 10, name
        assert key.kind, name
        assert re.search(rf"^{re.escape(name)}  \(", shown, re.MULTILINE), name
        assert key.doc in shown
    assert "torchrun" in shown
    assert re.search(r"^data.root  \(required\)", shown, re.MULTILINE)


def test_help_survives_the_template_it_is_run_through() -> None:
    from string import Template

    assert Template(help_text()).substitute() == help_text().replace("$$", "$")


def config(**changes: Any) -> Config:
    groups = {"data": FakeConfig(), "transform": TransformConfig(), "model": ModelConfig()}
    return Config(**groups | changes)


@pytest.mark.parametrize(
    ("output", "collect"),
    [
        (OutputConfig(), "gather"),
        (OutputConfig(fields=["topk", "logits"]), "shards"),
        (OutputConfig(format="npy"), "shards"),
        (OutputConfig(format="npy", collect="gather"), "gather"),
        (OutputConfig(collect="shards"), "shards"),
    ],
)
def test_auto_collect_keeps_wide_rows_on_their_rank(output: OutputConfig, collect: str) -> None:
    assert config(output=output).collect == collect


def test_shard_reads_i_of_n() -> None:
    assert (parse_shard(None), parse_shard("0/1"), parse_shard("2/16")) == ((0, 1), (0, 1), (2, 16))


def test_composed_configuration_becomes_schema_objects() -> None:
    cfg = OmegaConf.structured(Config)
    for group, options in GROUPS.items():
        cfg[group] = next(iter(options.values()))
    made = to_config(cfg)
    assert made == config()
    cfg.data = FolderConfig
    with pytest.raises(UsageError, match=r"^data\.root must be given, got nothing\. Add data\.root=VALUE\.$"):
        to_config(cfg)
    cfg.data.root = "somewhere"
    assert to_config(cfg).data == FolderConfig(root="somewhere")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": ArrayConfig(path="x.npy"), "transform": TransformConfig(name="plain")},
        {"data": FolderConfig(root="~/photos"), "output": OutputConfig(fields=["topk", "logits"]), "max_errors": 0.5},
    ],
)
def test_the_other_ranks_get_the_configuration_as_it_is(changes: dict[str, Any]) -> None:
    mine = config(**changes)
    assert unpack(json.loads(json.dumps(pack(mine)))) == mine
