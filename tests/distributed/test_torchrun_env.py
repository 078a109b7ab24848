"""A rank's place read from the variables that torchrun sets."""

import pytest

from mgpu_ddp.distributed import torchrun_env
from mgpu_ddp.distributed.place import Place
from mgpu_ddp.errors import UsageError

WORKER = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_a_worker_knows_its_place() -> None:
    place = torchrun_env.read_place(WORKER)
    assert place == Place(rank=5, size=8, local_rank=1, local_size=4, attempt=2, master=("10.0.0.7", 29500))


def test_one_rank_on_each_host_may_leave_out_where_it_is_there() -> None:
    place = torchrun_env.read_place({name: WORKER[name] for name in torchrun_env.REQUIRED})
    assert place == Place(rank=5, size=8, master=("10.0.0.7", 29500))


@pytest.mark.parametrize("environ", [{}, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}])
def test_who_has_no_rank_is_alone(environ: dict[str, str]) -> None:
    assert torchrun_env.read_place(environ) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": ""}, "RANK is set in the environment, but not WORLD_SIZE. "),
        ({"RANK": None}, "WORLD_SIZE is set in the environment, but not RANK. "),
        (
            {"MASTER_ADDR": "", "MASTER_PORT": None},
            "RANK is set in the environment, but not MASTER_ADDR, MASTER_PORT. ",
        ),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number, got 'http'. "),
        ({"RANK": "-1"}, "RANK must be a whole number, got '-1'. "),
        ({"RANK": "8"}, "RANK must be below WORLD_SIZE=8, got 8. "),
    ],
)
def test_what_is_set_by_half_is_refused_by_name(changes: dict[str, str | None], words: str) -> None:
    environ = {name: value for name, value in {**WORKER, **changes}.items() if value is not None}
    with pytest.raises(UsageError) as refused:
        torchrun_env.read_place(environ)
    assert str(refused.value) == words + torchrun_env.REMEDY
