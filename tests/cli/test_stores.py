"""Jobs whose images lie in an object store, under real torchrun: killed, throttled, locked out, never indiscreet."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import s3
from tests.support.runs import assert_proved, make_images, read_rows
from tests.support.sources import sources
from tests.support.starting import (
    SMALL_IMAGES,
    committed_rows,
    finish,
    ranks,
    run,
    started,
    torchrun,
    wait_until,
    worker_pids,
)

COUNT = 400


def served_as(source: str, bucket: Path) -> tuple[list[str], list[str]]:
    """Images as a source has them: its settings in the bucket, and on the disk."""
    photos = bucket / "photos"
    images = make_images(photos, COUNT)
    if source == "folder":
        return ["data=folder", "data.root=s3://bucket/photos"], ["data=folder", f"data.root={photos}"]
    sources(bucket, images, [None] * COUNT)
    pattern = {"webdataset": "shard-{00..02}.tar", "parquet": "*.parquet"}[source]
    return [f"data={source}", f"data.urls='s3://bucket/{pattern}'"], [
        f"data={source}",
        f"data.urls='{bucket}/{pattern}'",
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", ["folder", "webdataset", "parquet"])
def test_a_job_survives_what_happens_to_stores_and_tells_nobody_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    in_bucket, on_disk = served_as(source, tmp_path / "served" / "bucket")
    settings = (*SMALL_IMAGES, "output.commit_every=40", "loader.block=8")
    far = (*settings, *in_bucket, "output.dir=out")
    with s3.served(tmp_path / "served", tmp_path / "log") as port, s3.proxied(port) as proxy:
        s3.use(monkeypatch, proxy.port)
        proxy.latency_s = 0.2
        faults = [*s3.SLOW_DOWN, "reset"]
        proxy.fault = lambda number: faults[number // 7 % 3] if number % 7 == 0 else None
        with started(torchrun(2, *far), tmp_path) as launcher:
            wait_until(lambda: committed_rows(tmp_path / "out") > 0, launcher)
            os.kill(worker_pids(launcher.pid)[1], signal.SIGKILL)
            assert finish(launcher, tmp_path, time.monotonic()).code == 1
        kept = committed_rows(tmp_path / "out")
        assert 0 < kept < COUNT
        told = [(tmp_path / "stderr.txt").read_text()]

        proxy.latency_s, expires = 0.0, proxy.asked + 100
        proxy.fault = lambda number: s3.EXPIRED if number > expires else None
        locked_out = run(ranks(2, *far), tmp_path)
        told.append(locked_out.err)
        assert locked_out.code == 1
        reason = json.loads((tmp_path / "out" / "status.json").read_text())["reason"]
        assert "cannot be read with these credentials (" in reason
        assert "ExpiredToken" in reason
        assert "retry.py" not in locked_out.err, "a traceback says no more than the line"
        assert kept < committed_rows(tmp_path / "out") < COUNT

        proxy.fault = lambda number: None
        again = run(ranks(3, *far), tmp_path)
        assert again.code == 0, again.err
        told += [again.err, again.out]
        assert_proved(tmp_path / "out", COUNT)
    near = run(ranks(1, *settings, *on_disk, "output.dir=near"), tmp_path)
    assert near.code == 0, near.err
    assert read_rows(tmp_path / "out") == read_rows(tmp_path / "near")
    told += [path.read_bytes().decode("latin-1") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(s3.SECRET in text or s3.KEY in text for text in told)
