"""The cluster that the tests share, or the reason why there is none."""

import os
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacking = missing()
    if lacking:
        reason = f"needs {lacking}: apt-get install slurm-wlm munge"
        assert "MGPU_DDP_REQUIRE_SLURM" not in os.environ, reason
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    # munged refuses to work below folders that others may write to or not enter.
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)
    with running(folder) as cluster:
        yield cluster
