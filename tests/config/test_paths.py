"""Paths are taken as they are typed, whatever Hydra's grammar has to say of their characters."""

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mgpu_ddp.config.allowlist import parse
from mgpu_ddp.config.command_line import check_command
from mgpu_ddp.config.compose import compose_config
from mgpu_ddp.config.paths import as_typed, path_keys

pytestmark = pytest.mark.usefixtures("registered")

NAMES = [
    *(
        "My Photos/Österreich",
        "a(b)",
        "it's",
        '12" vinyl',
        "日本",
        "IMG#1",
        "a,b",
        "{x}",
        "{a,b}.tar",
        "a=b",
        "-x",
        "[1]",
    ),
    *(
        "trailing  ",
        " leading",
        "1e3",
        "1_000",
        "true",
        "1.10",
        "back\\slash",
        "end\\",
        "$HOME",
        "100%",
        "@x",
        "a;b&c|d",
    ),
    *("choice(a,b)", "range(1,3)", "*?[a]", "a\nb", os.fsdecode(b"caf\xe9"), "it's, {x}=[1] (é)\\"),
]


def value_of(key: str, *words: str) -> str:
    """The value that Hydra composes for a key."""
    return str(OmegaConf.select(compose_config(check_command(words).words), key))


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_is_typed(name: str) -> None:
    keys = path_keys() - {"hydra.sweep.dir", "hydra.sweep.subdir", "data.urls"}
    for data, typed in {"list": keys, "parquet": {"data.urls"}}.items():
        composed = compose_config(check_command([f"data={data}", *(f"++{key}={name}" for key in typed)]).words)
        assert {key: OmegaConf.select(composed, key) for key in typed} == dict.fromkeys(typed, name)


def test_a_url_is_taken_as_it_is_typed() -> None:
    assert value_of("data.root", "data=folder", "data.root=s3://bucket/a b, (c)") == "s3://bucket/a b, (c)"


def test_every_key_that_is_a_path_is_marked() -> None:
    ours = {"data.root", "data.path", "data.urls", "model.weights", "model.class_names", "output.dir"}
    assert path_keys() >= ours | {"hydra.run.dir", "hydra.sweep.dir"}
    assert not any(
        "dir" in key or "file" in key for key in path_keys() - {"output.dir"} if not key.startswith("hydra.")
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'a b,c'", "a b,c"),
        ('"it\'s"', "it's"),
        ("'it\\'s'", "it's"),
        (r"a\,b\ c", "a,b c"),
        (r"'\${x}'", "${x}"),
        ("runs/${model.name}", "runs/resnet18"),
        ("it's {${model.name}}", "it's {resnet18}"),
        ("null", "None"),
    ],
)
def test_what_was_quoted_for_hydra_goes_on_to_work(typed: str, meant: str) -> None:
    assert value_of("output.dir", f"output.dir={typed}") == meant


def test_other_keys_keep_hydras_grammar() -> None:
    for word in ("model.name=1e3", "seed=[1]", "data=a,b", "output.fields=[topk]", "output={dir:x}", "output.dir"):
        assert as_typed(word, sweeps=False) == word


def test_a_home_folder_is_found_by_its_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in ("output.dir", "hydra.run.dir"):
        assert check_command([f"{key}=~/my runs"]).folder == f"{tmp_path}/my runs"


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("a,b", ["a", "b"]),
        ("My Photos,it's,日本", ["My Photos", "it's", "日本"]),
        ("'a,b',\"c,d\",e", ["a,b", "c,d", "e"]),
        (r"a\,b,c", ["a,b", "c"]),
        ("{a,b}.tar,{1..3}.tar", ["{a,b}.tar", "{1..3}.tar"]),
        ("1e3,0x1", ["1e3", "0x1"]),
        ("choice(a,b)", ["a", "b"]),
        ("'x,y", ["'x", "y"]),
    ],
)
def test_a_comma_separates_values_of_a_sweep_unless_it_is_quoted(typed: str, values: list[str]) -> None:
    (override,) = parse([as_typed(f"output.dir={typed}", sweeps=True)])
    found = [parse([f"output.dir={text}"])[0].value() for text in override.sweep_string_iterator()]
    assert found == values
    assert value_of("output.dir", f"output.dir={typed}") != values[0], "without a sweep it is one path, or was quoted"


def test_one_path_of_a_sweep_over_another_key_is_as_typed() -> None:
    command = check_command(["-m", "data=folder", "data.root=My Photos (2)", "seed=1,2"])
    assert command.swept == ("seed",)
    assert OmegaConf.select(compose_config([w for w in command.words if w.startswith("data")]), "data.root") == (
        "My Photos (2)"
    )
