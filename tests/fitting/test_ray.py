"""Ray as an engine: one node, two nodes of one machine, a worker that is killed. Skipped where Ray is not installed;
scripts/ray-suite installs it and runs these."""

import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import calls
import eigenlorax
from eigenlorax import formats
from eigenlorax.core import engine
from eigenlorax.errors import OptionError
from planted import shared_collection

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray", reason="Ray is not installed")
cluster_utils = pytest.importorskip("ray.cluster_utils")

HERE = str(Path(__file__).parents[1])


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Workers import the calls of these tests, and this checkout."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, *sys.path])
    yield
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of two nodes, each with one CPU, to which this process is connected."""
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8}
    )
    cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    for adapter in shared_collection(9, noise=0.2)[0]:
        formats.write_adapter(adapter, path / adapter.name)
    return path


def test_both_nodes_make_calls(two_nodes):
    with engine.open_engine("ray") as found:
        assert found.workers == 2
        assert list(found.run(partial(calls.square, n) for n in range(30))) == [n**2 for n in range(30)]
        shared = found.share(list(range(1000)))
        assert list(found.run(partial(calls.length_of, shared) for _ in range(6))) == [1000] * 6
        assert len(set(found.run([partial(_slow_node)] * 8))) == 2
    assert ray.is_initialized()


def _slow_node():
    import time

    import ray

    time.sleep(0.3)
    return ray.get_runtime_context().get_node_id()


def test_a_worker_that_is_killed_is_replaced(two_nodes, tmp_path):
    with engine.open_engine("ray") as found:
        made = [partial(calls.die_once, str(tmp_path / "killed"), n) for n in range(6)]
        assert list(found.run(made)) == list(range(6))
    assert (tmp_path / "killed").exists()


def test_errors_of_ours_come_back_as_they_were(two_nodes):
    with engine.open_engine("ray") as found, pytest.raises(OptionError, match=r"^this is refused\.$"):
        list(found.run([partial(calls.refuse, "this")]))


def test_the_pack_is_the_one_that_a_serial_fit_makes(two_nodes, folder, tmp_path):
    serial = eigenlorax.fit(folder, n_components=4)
    other = eigenlorax.fit(folder, n_components=4, engine="ray")
    assert other.names == serial.names
    for name in serial.names:
        assert other.records[name].delta_error == pytest.approx(serial.records[name].delta_error, rel=1e-5)


def test_a_fit_whose_workers_are_killed_ends_with_the_same_pack(two_nodes, folder):
    with engine.open_engine("ray") as found:
        workers = set(found.run([calls.process] * 8))

    def kill(stage, done, total):
        if stage == "fitting modules" and done == 0:
            for worker in workers:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    other = eigenlorax.fit(folder, n_components=4, engine="ray", progress=kill)
    serial = eigenlorax.fit(folder, n_components=4)
    for name in serial.names:
        assert other.records[name].delta_error == pytest.approx(serial.records[name].delta_error, rel=1e-5)


def test_a_cluster_of_this_machine_is_started_and_stopped_where_there_is_none(folder, two_nodes):
    ray.shutdown()
    with engine.open_engine("ray") as found:
        assert list(found.run([partial(calls.square, 7)])) == [49]
    assert not ray.is_initialized()
