"""Arrow without pandas, which nothing here needs."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder


class _Refusal(MetaPathFinder):
    def find_spec(self, fullname: str, _path: Sequence[str] | None, _target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("pandas is not for Arrow to import", name=fullname)


def keep_pandas_out() -> None:
    """Let Arrow find no pandas in this process, and in those forked from it, unless it is imported already.

    Arrow imports pandas, where that is installed, to ask whether a value is one of pandas': in `pa.array` of a list
    or an ndarray alike, `pa.scalar`, `to_numpy`, and compute functions that are given a Python value. That takes 0.4
    to 2 s and holds the GIL, so the predicting loop would stand still. It asks once. Whoever imports pandas still
    can, and what is asked of Arrow for pandas, as `to_pandas`, still finds it.
    """
    import pyarrow as pa

    refusal = _Refusal()
    sys.meta_path.insert(0, refusal)
    try:
        # Of a list: of an ndarray it would ask again later.
        pa.array([])
    finally:
        sys.meta_path.remove(refusal)
