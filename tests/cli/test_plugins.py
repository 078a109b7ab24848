"""A package that offers models, as docs/own.md has it: built as a wheel, installed, and run by name."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from torchvision.transforms import v2

from tests.support.packages import build_wheel, install, install_wheel
from tests.support.runs import ROOT, assert_proved, make_images, read_rows
from tests.support.starting import BIN, TIMEOUT_S, ranks, run

PAGE = (ROOT / "docs" / "own.md").read_text()


def shown(what: str, language: str) -> str:
    (text,) = re.findall(rf"<!-- {re.escape(what)} -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(text)


@pytest.mark.slow
def test_the_package_of_the_docs_is_built_installed_and_run(tmp_path: Path) -> None:
    project = tmp_path / "my-lab"
    project.mkdir()
    for name, language in (("pyproject.toml", "toml"), ("my_lab.py", "python")):
        (project / name).write_text(shown(name, language))
    site = install_wheel(build_wheel(project), tmp_path / "site-packages")
    make_images(tmp_path / "photos", 5)
    path = f"{site}:{os.environ.get('PYTHONPATH', '')}"
    environ = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": path}
    for command in shown("plugin", "bash").splitlines():
        words = f"{command} transform.name=plain transform.size=32"
        subprocess.run(["bash", "-euc", words], cwd=tmp_path, env=environ, timeout=TIMEOUT_S, check=True)
    tables = [read_rows(tmp_path / name) for name in ("one", "two")]
    for folder in ("one", "two"):
        assert_proved(tmp_path / folder, 5)
    transform = v2.Compose([v2.Resize((32, 32)), v2.ToImage()])
    for row, other in zip(*tables, strict=True):
        with Image.open(tmp_path / "photos" / row["path"]) as image:
            mean = (transform(image.convert("RGB")) / 255).mean().item()
        assert (row["mean"], other["twice"]) == (pytest.approx(mean, abs=1e-3), pytest.approx(2 * mean, abs=2e-3))


def test_a_folder_of_images_offers_no_code(tmp_path: Path) -> None:
    """What lies in the working directory or in the data is not installed, and nothing of it is imported."""
    for folder in (tmp_path, tmp_path / "photos"):
        code = f"open({str(tmp_path / 'marker')!r}, 'w')\n"
        install(folder, "evil", "1.0", {"x": "evil:build"}, code)
    make_images(tmp_path / "photos", 3)
    settings = ("data=folder", "data.root=photos", "output.dir=out")
    ended = run(ranks(1, "model=plugin", "model.name=photos/evil:build", *settings), tmp_path)
    assert ended.code == 2
    (line,) = [line for line in ended.err.splitlines() if line.startswith("mgpu_ddp: ")]
    assert line.startswith("mgpu_ddp: model.name must be a plugin that is installed (")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()
