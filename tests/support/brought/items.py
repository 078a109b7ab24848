"""A dataset in SQLite: encoded images with keys, labels and more; of some rows the image cannot be read."""

import os
import sqlite3
from typing import Any

import mgpu_ddp
from tests.support.brought.classes import build


class Items:
    """Holds a connection, which no process can send to another."""

    def __init__(self) -> None:
        with self.connect() as connection:
            (self.length,) = connection.execute("select count(*) from photos").fetchone()
        self.connection: sqlite3.Connection | None = None

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(os.environ["PHOTOS"])

    def __len__(self) -> int:
        return int(self.length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.connection = self.connection or self.connect()
        row = self.connection.execute("select * from photos where id = ?", (index,)).fetchone()
        _, key, image, label, weight, caption = row
        if caption == "gone":
            raise FileNotFoundError(f"{key} is gone")
        return {"image": image, "key": key, "label": label, "weight": weight, "caption": caption}


if __name__ == "__main__":
    mgpu_ddp.main(model=build, dataset=Items)
