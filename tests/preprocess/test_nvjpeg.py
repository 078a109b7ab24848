"""The place of nvJPEG, and what is said where there is none; decoding itself takes a GPU."""

import importlib.machinery
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mgpu_ddp.config.schema import Config, FolderConfig, ModelConfig, RuntimeConfig, TransformConfig
from mgpu_ddp.errors import UsageError
from mgpu_ddp.inference.gpu_input import decode_of
from mgpu_ddp.preprocess import nvjpeg


@pytest.fixture
def bundled() -> Path:
    """The library that torchvision's wheel for CUDA brings."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    found = sorted((Path(str(spec.origin)).parent.parent / "torchvision.libs").glob("libnvjpeg*"))
    if not found:
        pytest.skip("torchvision is one for CPUs")
    return found[0]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    nvjpeg.library.cache_clear()
    yield
    nvjpeg.library.cache_clear()


@pytest.mark.parametrize("where", ["torchvision.libs", "nvidia/cu13/lib", "nvidia/nvjpeg/lib"])
def test_the_library_is_found_in_any_package_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundled: Path, where: str
) -> None:
    for name in ("torchvision", "nvidia"):
        (tmp_path / name).mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    (tmp_path / where / "libnvjpeg.so.12").write_bytes(b"of another machine")
    (tmp_path / where / "libnvjpeg.so.13").symlink_to(bundled)
    find = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name, [str(tmp_path)]))
    library = nvjpeg.library()
    assert library is not None
    assert library._name == str(tmp_path / where / "libnvjpeg.so.13")
    assert nvjpeg.library_version().count(".") == 2


def test_a_job_on_a_gpu_says_how_to_decode_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nvjpeg, "places", lambda: [tmp_path])
    monkeypatch.setattr(nvjpeg, "NAMES", ())
    monkeypatch.setattr(logging.getLogger("mgpu_ddp"), "propagate", True)
    data, device = FolderConfig(root=str(tmp_path)), torch.device("cuda")
    config = Config(data=data, transform=TransformConfig(), model=ModelConfig())
    assert nvjpeg.library_version() == ""
    assert decode_of(config, device) == "cpu"
    (said,) = caplog.messages
    assert said.startswith(
        "JPEGs are decoded on CPUs, many times as slowly as on the GPU: nvJPEG is missing. pip install"
    )
    config = Config(data=data, transform=TransformConfig(), model=ModelConfig(), runtime=RuntimeConfig(decode="gpu"))
    with pytest.raises(
        UsageError, match=r"^runtime.decode must be cpu or auto without nvJPEG.*pip install nvidia-nvjpeg"
    ):
        decode_of(config, device)
    for decode in ("cpu", "scaled"):
        quiet = Config(
            data=data, transform=TransformConfig(), model=ModelConfig(), runtime=RuntimeConfig(decode=decode)
        )
        assert decode_of(quiet, device) == decode
    assert len(caplog.messages) == 1
