"""Scripts of a user's, run as they would be, in processes that are forked."""

import runpy
import sys
from pathlib import Path

from tests.support.starting import Forks, places_in_world


def script(size: int, path: Path, *settings: str) -> Forks:
    """The ranks of `torchrun(size, path, ...)` without a launcher, or for one rank `python path ...`."""
    environs = [{}] if size == 1 else places_in_world(size)
    return Forks(function=be_script, arguments=(str(path), *settings), environs=environs)


def be_script(path: str, *settings: str) -> None:
    """Be `python path ...`."""
    sys.argv = [path, *settings]
    runpy.run_path(path, run_name="__main__")
