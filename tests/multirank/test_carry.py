"""Carried columns: W ranks carry what one rank does, whatever the format, through stops and kills."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import mgpu_ddp
from mgpu_ddp.notebook import words_of
from tests.support.carrying import KINDS, carried_by, parquet_list, parquet_source, values_of
from tests.support.runs import assert_proved, make_images, read_table
from tests.support.starting import SMALL_IMAGES, committed_rows, ranks, started, wait_until
from tests.support.worlds import Case, run_world, tiny

COUNT, BAD = 23, 6
FORMATS = ("parquet", "csv", "jsonl")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("images")
    images = make_images(root / "images", COUNT)
    images[BAD].write_bytes(b"no image")
    return {"list": parquet_list(root / "list.parquet", images), "parquet": parquet_source(root, images)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, every: dict[str, Any]) -> Path:
    out = tmp_path_factory.mktemp("out")

    def case(name: str, data: Any, run: str | None = None, *, stop: bool = False, **output: Any) -> Case:
        config = tiny(data=data, output={"commit_every": 6, **output})
        run_dir = str(out / "one" / run) if run else None
        return Case(name=name, config=config, run_dir=run_dir, stop_at=(0, 4) if stop else None)

    alone = [case(f"{name}-{how}", data, format=how) for name, data in every.items() for how in FORMATS]
    stopped = [case(f"{name}-stopped", data, stop=True) for name, data in every.items()]
    run_world(1, [*alone, *stopped], out / "one")
    for name, data in every.items():
        kill(name, data, out / "one")
    ways = ("gather", "shards")
    together = [case(f"{name}-{how}", data, collect=how) for name, data in every.items() for how in ways]
    again = [
        case(f"{name}-{how}-again", data, f"{name}-{how}")
        for name, data in every.items()
        for how in ("stopped", "killed")
    ]
    run_world(2, [*together, *again], out / "two")
    return out


def kill(name: str, data: Any, out: Path) -> None:
    """Kill a job once it has committed rows."""
    given = {key: value for key, value in asdict(data).items() if key in ("path", "urls", "carry")}
    words = [word for key, value in given.items() for word in words_of(f"data.{key}", value)]
    settings = (*SMALL_IMAGES, "output.commit_every=6", f"output.dir={name}-killed", "runtime.device=cpu")
    with started(ranks(1, f"data={name}", *words, *settings), out) as process:
        wait_until(lambda: committed_rows(out / f"{name}-killed") > 0, process)
        process.kill()


@pytest.mark.parametrize("name", ["list", "parquet"])
def test_any_number_of_ranks_carries_what_one_does(out: Path, name: str) -> None:
    alone = read_table(out / "one" / f"{name}-parquet")
    assert carried_by(alone) == [values_of(number) for number in range(COUNT)]
    for run in ("two/{}-gather", "two/{}-shards", "one/{}-stopped", "one/{}-killed"):
        run_dir = out / run.format(name)
        assert_proved(run_dir, COUNT, errors=1)
        assert read_table(run_dir).equals(alone)
    wide = {"dictionary<values=string, indices=int32, ordered=0>": "string"}
    if name == "list":
        wide = dict.fromkeys([*wide, "string"], "large_string")
    for column, kind in KINDS.items():
        found = alone.schema.field("source_label" if column == "label" else column).type
        assert str(found).replace("element", "item") == wide.get(str(kind), str(kind))


@pytest.mark.parametrize("name", ["list", "parquet"])
@pytest.mark.parametrize("how", FORMATS)
def test_every_format_gives_back_what_was_carried(out: Path, name: str, how: str) -> None:
    table = mgpu_ddp.open(out / "one" / f"{name}-{how}").table()
    expected = read_table(out / "one" / f"{name}-parquet")
    assert table.schema.equals(expected.schema)
    assert carried_by(table) == carried_by(expected)
    assert table["error"][BAD].as_py()
