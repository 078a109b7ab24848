"""Images of your own, here rows of a SQLite table (id, jpeg, species, taken), with their key, label and year.

PHOTOS=photos.sqlite mgpu-infer examples/own_data.py model.weights=DEFAULT
"""

import functools
import os
import sqlite3
from contextlib import closing
from typing import Any

from torch.utils.data import Dataset

import mgpu_ddp

PATH = os.path.abspath(os.environ.get("PHOTOS", "photos.sqlite"))


def connect() -> sqlite3.Connection:
    return sqlite3.connect(f"file:{PATH}?mode=ro", uri=True)


@functools.cache
def connection_of(_process: int) -> sqlite3.Connection:
    """Each loader worker has its own: a connection must not be used on the other side of a fork."""
    return connect()


class Photos(Dataset[dict[str, Any]]):
    """A photograph for each row of the table."""

    def __init__(self) -> None:
        with closing(connect()) as connection:
            self.ids = [row[0] for row in connection.execute("SELECT id FROM photos ORDER BY id")]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        query = "SELECT jpeg, species, taken FROM photos WHERE id = ?"
        jpeg, species, taken = connection_of(os.getpid()).execute(query, [self.ids[index]]).fetchone()
        # `key` becomes the row's `path`, and `label` is what its prediction is compared with; all else is copied.
        return {"image": jpeg, "key": self.ids[index], "label": species, "taken": taken}


if __name__ == "__main__":
    mgpu_ddp.main(dataset=Photos)
