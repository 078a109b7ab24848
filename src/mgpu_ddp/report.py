"""`python -m mgpu_ddp.report run=DIR`: the page of a finished run folder, or of a sweep, made again."""

import json
import math
import os
import sys
from pathlib import Path

from mgpu_ddp.config.checks import require
from mgpu_ddp.errors import Exit, MgpuError, UsageError
from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.output.run_folder import hold_folder
from mgpu_ddp.reporting.class_table import read_classes
from mgpu_ddp.reporting.page import THUMBNAILS, samples_of, write
from mgpu_ddp.reporting.table_stats import tally
from mgpu_ddp.sweep.page import write_sweep_page
from mgpu_ddp.sweep.results import LEDGER


def main() -> None:
    """Make the page of a finished run folder again and print one JSON line."""
    try:
        print(json.dumps({"report": str(rebuild(sys.argv[1:]))}))
    except MgpuError as error:
        print(f"mgpu_ddp: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except OSError as error:
        print(f"mgpu_ddp: run must be a readable and writable folder, got: {error}", file=sys.stderr)
        sys.exit(int(Exit.FAILED))


def rebuild(argv: list[str]) -> Path:
    key, _, value = argv[0].partition("=") if len(argv) == 1 else ("", "", "")
    require(key == "run" and bool(value), "run", "a run folder", " ".join(argv), "Give run=DIR.")
    run_dir = Path(value).absolute()
    if Manifest.read(run_dir) is None and (run_dir / LEDGER).exists():
        return _of_a_sweep(run_dir)
    if Manifest.read(run_dir) is None:
        raise UsageError(
            f"run must be a folder with a manifest.json, got {value!r}. Name the folder of a job or a sweep."
        )
    held = hold_folder(run_dir)
    try:
        # Once more: until here a job may have been at work.
        manifest = Manifest.read(run_dir)
        assert manifest is not None
        classes = read_classes(run_dir, manifest)
        samples = samples_of(run_dir, manifest)
        counted = tally(run_dir, manifest, classes, samples, num_picked=THUMBNAILS)
        return write(run_dir, manifest, classes, counted, samples, home=run_dir, thumbnails_s=math.inf)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(
            f"run must hold what a job has written, got {value!r} ({why}). Start that job again."
        ) from None
    finally:
        os.close(held)


def _of_a_sweep(folder: Path) -> Path:
    try:
        return write_sweep_page(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UsageError(f"run must hold what a sweep has written, got {str(folder)!r} ({why}). Sweep again.") from None


if __name__ == "__main__":
    main()
