"""A sweep's rows and its answer, from the outcomes of its jobs."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgpu_ddp.errors import PeerLostError, UsageError
from mgpu_ddp.job.autotune import smallest_near_best
from mgpu_ddp.report import rebuild
from mgpu_ddp.sweep.sweep import Point, Sweep


def point(job: int, repeat: int = 1, **values: Any) -> Point:
    return Point(
        job=job,
        repeat=repeat,
        values={key.replace("__", "."): value for key, value in values.items()},
        overrides=[f"{key}={value}" for key, value in values.items()],
    )


def measured(images_per_s: float, gigabytes: float = 1) -> dict[str, Any]:
    return {
        "status": "complete",
        "exit_code": 0,
        "images_per_s": images_per_s,
        "startup_s": 1.0,
        "steady_s": 3.0,
        "peak_gpu_bytes": int(gigabytes * 2**30),
        "peak_host_bytes": 2**30,
    }


FAILED = {"status": "failed", "exit_code": 1, "reason": "it broke"}
OOM = {"status": "oom", "exit_code": 1, "reason": "too large", "peak_gpu_bytes": 9 * 2**30, "peak_host_bytes": 1}


def sweep_of(folder: Path, *rows: tuple[Point, dict[str, Any]], stop_on_oom: bool = False) -> Sweep:
    keys = list(dict.fromkeys(key for point, _ in rows for key in point.values))
    sweep = Sweep(folder, keys, stop_on_oom=stop_on_oom)
    for each, outcome in rows:
        used = {"batch_size": each.values.get("batch_size", 32)}
        sweep.run(each, lambda outcome=outcome, used=used: outcome | used)
    return sweep


def test_the_smallest_batch_near_the_best_rate_is_recommended(tmp_path: Path) -> None:
    rates = {16: 700.0, 32: 965.0, 64: 975.0, 128: 1000.0, 256: 990.0}
    sweep = sweep_of(tmp_path, *((point(i, batch_size=n), measured(rates[n])) for i, n in enumerate(rates)))
    assert sweep.answer() == {"recommended": {"batch_size": 64}, "best_images_per_s": 1000.0}
    assert smallest_near_best(rates) == 64
    assert smallest_near_best({}) == 8


def test_of_repeats_the_median_counts_and_one_that_failed_spoils_its_point(tmp_path: Path) -> None:
    rows = [(1, 8, measured(100)), (1, 16, measured(300)), (2, 8, measured(110)), (2, 16, FAILED), (3, 8, measured(50))]
    sweep = sweep_of(tmp_path, *((point(i, r, batch_size=n), found) for i, (r, n, found) in enumerate(rows)))
    first, second = sweep.points
    assert (first["images_per_s"], first["slowest"], first["fastest"]) == (100, 50, 110)
    assert (second["images_per_s"], second["status"], second["reason"]) == (None, "failed", "it broke")
    assert sweep.answer()["recommended"] == {"batch_size": 8}


def test_without_a_batch_size_the_fastest_is_recommended(tmp_path: Path) -> None:
    sweep = sweep_of(
        tmp_path,
        (point(0, runtime__precision="fp32"), measured(99)),
        (point(1, runtime__precision="fp16"), measured(100)),
    )
    assert sweep.answer()["recommended"] == {"runtime.precision": "fp16"}


def test_larger_batches_than_one_that_did_not_fit_are_skipped_where_asked(tmp_path: Path) -> None:
    def must_not_run() -> dict[str, Any]:
        raise AssertionError("this point was to be skipped")

    sweep = sweep_of(tmp_path, (point(0, batch_size=8, model__name="vgg16"), OOM), stop_on_oom=True)
    assert sweep.run(point(1, batch_size=16, model__name="vgg16"), must_not_run) == 0.0
    assert sweep.run(point(2, batch_size=16, model__name="resnet18"), lambda: measured(5)) == 5.0
    assert sweep.run(point(3, batch_size=4, model__name="vgg16"), lambda: measured(6)) == 6.0
    assert [p["status"] for p in sweep.points] == ["oom", "skipped", "complete", "complete"]
    (tmp_path / "eager").mkdir()
    eager = sweep_of(tmp_path / "eager", (point(0, batch_size=8), OOM))
    assert eager.run(point(1, batch_size=16), lambda: measured(7)) == 7.0


def test_each_row_is_on_disk_as_soon_as_it_is_known(tmp_path: Path) -> None:
    seen = []

    def look() -> dict[str, Any]:
        seen.append(len(json.loads((tmp_path / "sweep.json").read_text())["jobs"]))
        return measured(1)

    sweep = sweep_of(tmp_path, (point(0, batch_size=8), FAILED))
    sweep.run(point(1, batch_size=16), look)
    assert seen == [1]


def test_after_a_lost_rank_or_a_signal_nothing_runs(tmp_path: Path) -> None:
    def lose() -> dict[str, Any]:
        raise PeerLostError("rank 1 of 2 died")

    sweep = Sweep(tmp_path, ["batch_size"], stop_on_oom=False)
    with pytest.raises(PeerLostError):
        sweep.run(point(0, batch_size=8), lose)
    assert sweep.run(point(1, batch_size=16), lose) == 0.0
    assert [row["reason"] for row in json.loads((tmp_path / "sweep.json").read_text())["jobs"]] == [
        "PeerLostError: rank 1 of 2 died"
    ]
    again = Sweep(tmp_path, ["batch_size"], stop_on_oom=False)
    again.run(point(0, batch_size=8), lambda: {"status": "preempted", "exit_code": 75})
    assert again.run(point(1, batch_size=16), lose) == 0.0


def test_what_was_complete_stays_and_another_sweep_is_refused(tmp_path: Path) -> None:
    sweep_of(tmp_path, (point(0, batch_size=8), measured(5)), (point(1, batch_size=16), FAILED))
    before = (tmp_path / "sweep.json").read_bytes()
    said = (
        r"dir must be new or hold this same sweep, got .* job 0 had 'batch_size=8' where this one has 'batch_size=4'\."
    )
    with pytest.raises(UsageError, match=said):
        sweep_of(tmp_path, (point(0, batch_size=4), measured(1)))
    assert (tmp_path / "sweep.json").read_bytes() == before
    again = sweep_of(tmp_path, (point(0, batch_size=8), FAILED), (point(1, batch_size=16), measured(9)))
    assert [p["images_per_s"] for p in again.points] == [5, 9]


@pytest.mark.parametrize("name", ["report.html", "sweep.csv", "sweep.png"])
def test_a_file_of_another_tool_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(UsageError, match=rf"hydra\.sweep\.dir must be new or hold a sweep, got .* foreign {name}\. Ch"):
        Sweep(tmp_path, ["seed"], stop_on_oom=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"jobs": 3}', '{"jobs": [{}]}'])
def test_a_file_that_no_sweep_wrote_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UsageError, match=r"is not the file of a sweep \(.*\)\. Choose another hydra\.sweep\.dir"):
        Sweep(tmp_path, [], stop_on_oom=False)
    assert (tmp_path / "sweep.json").read_text() == text


SHAPES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "one key": [({"batch_size": 2**i}, measured(100 - (i - 6) ** 2, i)) for i in range(3, 9)],
    "out of memory": [({"batch_size": 64}, measured(9)), ({"batch_size": 128}, OOM), ({"batch_size": -1}, FAILED)],
    "two keys": [
        ({"batch_size": n, "runtime__precision": p}, measured(n * len(p)))
        for n in (8, 16, 32)
        for p in ("fp32", "bf16x")
    ],
    "other work": [({"data__size": n}, measured(n)) for n in (10, 20)],
    "work and batches": [
        ({"model__name": name, "batch_size": n}, measured(n)) for name in ("resnet18", "vgg16") for n in (8, 16)
    ],
    "no number": [({"runtime__precision": name}, measured(len(name))) for name in ("fp32", "fp16xx", "bf16x")],
    "one that looks like two": [({"batch_size": size}, measured(3)) for size in (8, "auto")],
    "many lines": [({"batch_size": n, "seed": s}, measured(n + s)) for n in (8, 16) for s in range(9)],
    "nothing swept": [({}, measured(4))],
    "nothing ran": [({"batch_size": -1}, FAILED), ({"batch_size": 0}, FAILED)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_sweep_has_a_table_and_a_picture(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(point(i, **values), found) for i, (values, found) in enumerate(SHAPES[shape])]
    sweep = sweep_of(tmp_path, *rows)
    answer = sweep.conclude(0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(sweep.points)
    none = shape in ("nothing ran", "other work")
    assert sum("<- recommended" in line for line in lines) == (2 if shape == "work and batches" else not none)
    assert answer["jobs"] == len(rows)
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1 + len(rows)
    with Image.open(tmp_path / "sweep.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("L").getcolors() or []) > 20, "an empty picture has next to no shades"
    page = (tmp_path / "report.html").read_bytes()
    text = page.decode()
    assert len(page) < 2_000_000
    measured_points = sum(1 for each in sweep.points if each["images_per_s"])
    assert ("<img" in text) == (measured_points > 2), "of two points the table says all"
    assert text.count("<tr>") == 2 + len(sweep.points) + len(rows), "a line for each point and each job"
    assert ("Recommended: " in text) == (not none and shape != "nothing swept")
    (tmp_path / "report.html").unlink()
    assert rebuild(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == page


def test_the_page_leads_to_the_jobs_and_escapes_what_they_say(tmp_path: Path) -> None:
    place = tmp_path / "javascript:alert(1)"
    place.mkdir()
    (place / "report.html").touch()
    hostile = {"status": "failed", "exit_code": 1, "reason": "<script>alert(2)</script>", "run_dir": None}
    good = measured(5) | {"run_dir": str(place)}
    sweep = sweep_of(tmp_path, (point(0, model__name='"><img src=x>'), good), (point(1, model__name="b"), hostile))
    sweep.conclude(1)
    text = (tmp_path / "report.html").read_text()
    assert 'href="./javascript%3Aalert%281%29/report.html"' in text
    assert "&lt;script&gt;alert(2)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "<img src=x" not in text


@pytest.mark.parametrize("content", ['{"jobs": [{}], "swept": []}', "[]", "{", '{"jobs": 3, "swept": 4}'])
def test_a_page_of_a_damaged_sweep_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UsageError, match=r"is damaged: it lacks what a sweep writes \(.*\)\. Start the sweep again\.$"):
        rebuild(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_table_says_what_its_figures_rest_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(tmp_path, ["batch_size"], stop_on_oom=False)
    short = measured(5) | {"steady_s": 0.04}
    sweep.run(point(0, batch_size="auto"), lambda: short | {"batch_size": 16})
    sweep.run(point(1, batch_size=512), lambda: short | {"batch_size": 64})
    sweep.conclude(0)
    out = capsys.readouterr().out
    assert "with 16" in out
    assert "with 64" in out
    assert out.endswith("the shortest measurement took 0.04 s: more samples would make the rates comparable\n")


def test_a_picture_that_cannot_be_drawn_takes_nothing_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.png").mkdir()
    answer = sweep_of(tmp_path, (point(0, batch_size=8), measured(5))).conclude(0)
    assert answer["recommended"] == {"batch_size": 8}
    assert "<- recommended" in capsys.readouterr().out
