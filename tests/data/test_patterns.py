"""Braces and stars, as shells have them."""

from pathlib import Path

import pytest

from mgpu_ddp.data.patterns import expand, root_of
from mgpu_ddp.errors import UsageError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("/x/a.tar", ["/x/a.tar"]),
        ("/x/{08..11}.tar", ["/x/08.tar", "/x/09.tar", "/x/10.tar", "/x/11.tar"]),
        ("/x/{2..0}", ["/x/2", "/x/1", "/x/0"]),
        ("/x/{a,b}/{1..2}.tar", ["/x/a/1.tar", "/x/a/2.tar", "/x/b/1.tar", "/x/b/2.tar"]),
        ("/x/{literal}.tar", ["/x/{literal}.tar"]),
        ("/x/{,s}", ["/x/", "/x/s"]),
    ],
)
def test_braces_are_those_of_shells(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_stars_find_files_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt", "[1].tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/?.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand(f"{tmp_path}/[1].tar") == [f"{tmp_path}/[1].tar"], "a file of that very name"
    assert root_of(f"{tmp_path}/x/{{a,b}}/*.tar") == f"{tmp_path}/x"
    for pattern in (f"{tmp_path}/*.gone", "{0..99999999999}", "{0..999}{0..999}{0..9}", "{a,{b,c}}"):
        with pytest.raises(UsageError, match=r"^data\.urls"):
            expand(pattern)
