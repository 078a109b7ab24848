"""A user's own options: files of --config-dir, read as data, which are then as good as the package's."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from mgpu_ddp.config.command_line import check_command
from mgpu_ddp.config.compose import compose_config
from mgpu_ddp.config.options import MAX_BYTES, MAX_DEPTH, MAX_FILES, Options
from mgpu_ddp.config.schema import FakeConfig, FolderConfig, TransformConfig
from mgpu_ddp.errors import UsageError

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config folder in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    return folder


def write(name: str, text: str) -> Path:
    path = Path("mine") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def composed(*words: str) -> DictConfig:
    check_command(["-cd", "mine", *words])
    return compose_config(list(words))


def refused(*words: str) -> str:
    with pytest.raises(UsageError) as raised:
        check_command(["-cd", "mine", *words])
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_a_file_is_an_option_with_other_defaults() -> None:
    write("transform/small.yaml", "defaults: [plain]\nsize: 8\n")
    small = composed("transform=small").transform
    assert (small.name, small.size) == ("plain", 8)
    assert composed("transform=small", "transform.size=9").transform.size == 9
    assert composed("transform=small").hydra.runtime.choices.transform == "small"
    assert "must be one of auto, plain, imagenet, small, got 'large'" in refused("transform=large")


def test_a_sweep_chooses_between_files_and_options() -> None:
    write("transform/small.yaml", "defaults: [plain]\nsize: 8\n")
    write("transform/tiny.yaml", "defaults: [/transform/small]\nsize: 4\n")
    for swept in ("auto,small", "glob(*)", "glob([small,tiny])"):
        command = check_command(["-m", "-cd", "mine", f"transform={swept}"])
        assert command.swept == ("transform",)
        assert command.config_dir == str(Path("mine").absolute())
        assert "mine" not in " ".join(command.argv), "Hydra is not told of the folder"
    tiny = composed("transform=tiny").transform
    assert (tiny.name, tiny.size) == ("plain", 4)


def test_files_share_values_by_their_defaults() -> None:
    write("common.yaml", "follow_outside: true\n")
    write("data/base.yaml", "defaults: [folder, /common]\nroot: /a\n")
    write("data/photos.yaml", "defaults: [base, _self_]\nroot: ${oc.env:HOME}\n")
    write("data/first.yaml", "defaults: [folder, _self_, base2]\nroot: /first\n")
    write("data/base2.yaml", "root: /second\n")
    photos = composed("data=photos").data
    assert (photos.follow_outside, photos.root) == (True, os.environ["HOME"])
    assert composed("data=first").data.root == "/second", "the later one counts"


@pytest.mark.parametrize("header", ["# @package _global_", "# Mine.\n\n#@package _global_"])
def test_a_global_file_sets_keys_of_the_whole_job(header: str) -> None:
    text = "defaults: [/data/fake]\ndata: {size: 7}\nbatch_size: 8\noutput: {fields: [topk, logits]}\n"
    write("data/seven.yaml", f"{header}\n{text}")
    cfg = composed("data=seven")
    assert (cfg.data.size, cfg.data.num_classes, cfg.batch_size) == (7, 10, 8)
    assert cfg.output.fields == ["topk", "logits"]
    assert composed("data=seven", "batch_size=9").batch_size == 9


def test_an_option_of_files_has_the_keys_of_the_one_that_it_begins_with() -> None:
    write("data/photos.yaml", "defaults: [folder]\nroot: /a\n")
    write("data/few.yaml", "defaults: [fake]\nsize: 3\n")
    options = Options("mine")
    assert options.section("data", "photos") is FolderConfig
    assert options.section("data", "few") is FakeConfig
    assert options.section("transform", "plain") is TransformConfig
    assert "data.size must belong to the chosen data" in refused("data=photos", "data.size=3")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("defaults: [plain]\nsise: 8\n", "transform.sise must be a known key, got '8 in FILE'. Did you mean"),
        ("defaults: [plain]\nsize: many\n", "transform.size must be an integer, got 'many in FILE'. See --help."),
        ("defaults: [plain]\nhydra: {}\n", "transform.hydra must be a known key"),
        ("defaults: [plain]\n_target_: os.system\n", "transform._target_ must be a known key"),
        ("defaults: [plain]\nsize: {_target_: os.system}\n", "transform.size must be an integer"),
        ("defaults: [plain]\n1: 2\n", "transform.1 must be a known key"),
        ("# @package _global_\ndefaults: [plain]\nhydra: {verbose: true}\n", "hydra must be a known key"),
        ("# @package _global_\ndefaults: [plain]\n'hydra.verbose': true\n", "hydra.verbose must be a known key"),
        ("# @package _global_\ndefaults: [plain]\nmodel: evil\n", "model must be a group of keys"),
        ("# @package _global_\ndefaults: [plain]\nruntime: ${output}\n", "runtime must be a group of keys"),
        ("# @package _global_\ndefaults: [plain]\nsweep: {repeat: 3}\n", "sweep.repeat must be left to sweep.repeats"),
        ("# @package hydra\ndefaults: [plain]\nsize: 8\n", "files of the package _global_ or of none"),
        ("size: 8\n", "files whose first default, and no other, is an option of the package (auto, plain, imagenet)"),
        ("defaults: [plain, auto]\n", "files whose first default, and no other, is"),
        ("defaults: [_self_, plain]\n", "files whose first default, and no other, is"),
        ("defaults: [x]\n", "each named once"),
        ("defaults: plain\n", "keys with values, whose defaults are a list of names"),
        ("defaults: [{override /hydra/callbacks: evil}]\n", "whose defaults are a list of names"),
        ("- plain\n", "keys with values"),
        ("size: [\n", "readable YAML"),
        ("a: 1\n---\nb: 2\n", "readable YAML"),
        ("a: !!python/object/apply:os.system ['touch marker']\n", "readable YAML"),
        (f"a: {'9' * 5000}\n", "readable YAML"),
        (f"a: {'[' * 30000}\n", f"YAML without aliases, nested at most {MAX_DEPTH} deep"),
        ("a: [" + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "]\n", f"nested at most {MAX_DEPTH} deep"),
        ("a: " + "${a:" * 5000 + "}" * 5000 + "\n", "nested at most"),
        ("a: &x [1]\nb: *x\n", "YAML without aliases"),
        ("a: \x1b[31m\n", "readable YAML"),
        ("a: 1\n" + "#" * MAX_BYTES, "regular files of at most 65,536 bytes"),
        ("a: \ud800\n", "readable files"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(text: str, line: str) -> None:
    path = write("transform/x.yaml", "")
    path.write_bytes(text.encode(errors="surrogatepass"))
    for words in (["transform=x"], ["-m", "transform=auto,x"], ["--help", "transform=x"]):
        said = refused(*words)
        assert line.replace("FILE", str(path.absolute())) in said
        assert str(path.absolute()) in said
        assert said.isprintable()
    assert not Path("marker").exists()


def test_defaults_name_what_is_there() -> None:
    write("transform/x.yaml", "defaults: [plain, absent]\n")
    assert "mine/transform/absent.yaml'" in refused("transform=x")


def test_a_file_that_nothing_names_is_not_read() -> None:
    write("transform/broken.yaml", "[")
    write("transform/small.yaml", "defaults: [plain]\n")
    os.mkfifo("mine/transform/fifo.yaml")
    composed("transform=small")
    assert "--config-dir must hold readable YAML" in refused("-m", "transform=auto,broken")


@pytest.mark.parametrize("name", ["plain", "plain.yaml"])
def test_no_file_takes_the_place_of_an_option_of_the_package(name: str) -> None:
    write(f"transform/{name}.yaml", "defaults: [auto]\nsize: 8\n")
    assert "--config-dir must hold options of new names, got" in refused()


def test_files_of_other_names_are_no_options() -> None:
    for name in (".yaml", ".hidden.yaml", "x y.yaml", "x.yml", "X\n.yaml", "-m.yaml"):
        write(f"transform/{name}", "defaults: [plain]\n")
    write("transform/v1.2-b.yaml", "defaults: [plain]\n")
    assert Options("mine").names("transform") == ["auto", "plain", "imagenet", "v1.2-b"]


def test_chains_of_files_are_bounded() -> None:
    for number in range(MAX_FILES):
        write(f"transform/x{number}.yaml", f"defaults: [x{number + 1}]\n")
    write(f"transform/x{MAX_FILES}.yaml", "defaults: [plain]\nsize: 8\n")
    assert composed("transform=x1").transform.size == 8
    assert f"options of at most {MAX_FILES} files" in refused("transform=x0")


def test_links_lead_only_to_what_is_in_the_folder(tmp_path: Path) -> None:
    write("transform/small.yaml", "defaults: [plain]\nsize: 8\n")
    (tmp_path / "out.yaml").write_text("defaults: [plain]\n")
    links: dict[str, Any] = {"in": "small.yaml", "out": "../../out.yaml", "zero": "/dev/zero", "self": "self.yaml"}
    for name, target in links.items():
        Path(f"mine/transform/{name}.yaml").symlink_to(target)
    Path("mine/data").symlink_to("transform")
    Path("mine/model").symlink_to(".")
    os.mkfifo("mine/transform/fifo.yaml")
    Path("mine/transform/dir.yaml").mkdir()
    assert composed("transform=in").transform.size == 8
    for name in ("out", "zero", "self", "fifo", "dir"):
        assert "--config-dir must hold " in refused(f"transform={name}")


@contextmanager
def as_another_user() -> Iterator[None]:
    """Be somebody whom modes of files bind, as they do not bind root."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_listed_is_refused() -> None:
    """A file that cannot be listed can still be opened by name."""
    # Another user does not get as far as tmp_path.
    with tempfile.TemporaryDirectory() as folder:
        group = Path(folder, "data")
        group.mkdir()
        (group / "evil.yaml").write_text("defaults: [fake]\n")
        Path(folder).chmod(0o755)
        group.chmod(0o311)
        with as_another_user(), pytest.raises(UsageError, match="must hold folders that can be listed"):
            check_command(["-cd", folder, "data=evil"])
