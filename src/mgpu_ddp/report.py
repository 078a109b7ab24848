"""`python -m mgpu_ddp.report run=DIR`: write the page of a finished job or sweep again, from its folder alone."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgpu_ddp.config.checks import require
from mgpu_ddp.errors import Exit, MgpuError, UsageError
from mgpu_ddp.output.folders import check_utf8, holding
from mgpu_ddp.output.layout import check_layout
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.reporting.class_table import read_classes
from mgpu_ddp.reporting.page import JobResults, write_page
from mgpu_ddp.reporting.table_stats import count_rows
from mgpu_ddp.reporting.terminal import make_output_safe, print_mistake
from mgpu_ddp.reporting.thumbnails import reopen_samples
from mgpu_ddp.sweep.page import write_sweep_page
from mgpu_ddp.sweep.results import SWEEP_FILE
from mgpu_ddp.version import version_text

HELP = """\
Write report.html of a run folder or of a sweep again, from what the folder holds.

  python -m mgpu_ddp.report run=DIR

Nothing is predicted and no row is changed. The last line on stdout is JSON and names the page. Images are looked for
where they were, for the thumbnails; the page is written without those that are not there.
"""


def main() -> None:
    """Write the page of a folder again and print one JSON line."""
    run_command(lambda folder: {"report": str(rebuild(folder))}, HELP)


def run_command(act: Callable[[Path], dict[str, Any]], help_text: str) -> None:
    """Act on the folder that `run=DIR` names and print the result as one JSON line, or the error in one."""
    make_output_safe()
    try:
        argv = sys.argv[1:]
        if {"-h", "--help"} & {*argv}:
            print(help_text, end="")
            return
        if "--version" in argv:
            print(version_text())
            return
        key, _, value = argv[0].partition("=") if len(argv) == 1 else ("", "", "")
        value = os.path.expanduser(value)
        is_folder = key == "run" and value != "" and Path(value).is_dir()
        require(is_folder, "run", "a folder", " ".join(argv), "Give run=DIR.")
        check_utf8("run", str(Path(value).absolute()))
        print(json.dumps(act(Path(value).absolute())))
    except MgpuError as error:
        print_mistake(error)
        sys.exit(int(error.exit_code))
    except OSError as error:
        print_mistake(error)
        sys.exit(int(Exit.FAILED))


def rebuild(folder: Path) -> Path:
    """Write `report.html` of a job or a sweep again. Returns its path.

    Raises:
        UsageError: the folder is neither, or its files cannot be read.
    """
    check_layout(folder)
    is_job = Manifest.read(folder) is not None
    rule = f"a folder with a manifest.json or a {SWEEP_FILE}"
    is_either = is_job or (folder / SWEEP_FILE).exists()
    require(is_either, "run", rule, str(folder), "Name the folder of a job or a sweep.")
    try:
        return _rebuild_job(folder) if is_job else write_sweep_page(folder)
    except (MgpuError, OSError):
        raise
    except Exception as error:
        kind = "job" if is_job else "sweep"
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(
            f"{folder} is damaged: it lacks what a {kind} writes ({why}). Start the {kind} again."
        ) from None


def _rebuild_job(run_dir: Path) -> Path:
    with holding(run_dir):
        # Read again: until the folder was held, a job may have been at work.
        manifest = Manifest.read(run_dir)
        assert manifest is not None
        classes = read_classes(run_dir, manifest)
        samples = reopen_samples(run_dir, manifest)
        stats = count_rows(run_dir, manifest, classes, samples)
        results = JobResults(
            run_dir=run_dir,
            home=run_dir,
            manifest=manifest,
            classes=classes,
            stats=stats,
            samples=samples,
        )
        return write_page(results, thumbnails_s=math.inf)


if __name__ == "__main__":
    main()
