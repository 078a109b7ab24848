"""Packages that offer models: built as wheels, or laid out as an installer leaves them."""

import subprocess
import sys
import zipfile
from pathlib import Path


def build_wheel(project: Path) -> Path:
    """Build a project as pip does, with the setuptools that is installed."""
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True, timeout=100)
    (wheel,) = (project / "dist").glob("*.whl")
    return wheel


def install_wheel(wheel: Path, into: Path) -> Path:
    """Install a wheel of pure Python, which is to unpack it."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(into)
    return into


def install(into: Path, package: str, version: str, entries: dict[str, str], code: str = "") -> Path:
    """Leave a package of one module, of the same name, as an installer does."""
    info = into / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[mgpu_ddp.models]\n{lines}")
    (into / f"{package}.py").write_text(code)
    return into
