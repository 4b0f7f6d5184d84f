from __future__ import annotations

import gc
import mmap
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from gateway.backends.interface import Success
from gateway.backends.onnx import LoadOptions, OnnxReplica
from gateway.errors import ModelError
from gateway.registry.digest import read_artifact
from gateway.workers import bundle as module
from gateway.workers.bundle import Bundle, BundleError, BundleWriter, read_bundle
from gateway.workers.shm import sealed_file
from tests.registry.onnx_models import relocated, save, scaled
from tests.workers.rig import TestBatch, array_batch, floats, open_fds, pid_of, pool_of, run, until


def bundle_of(files: dict[str, bytes]) -> Bundle:
    writer = BundleWriter(sum(map(len, files.values())))
    for name, content in files.items():
        writer.begin(name)
        writer.write(content[:3])
        writer.write(content[3:])
    return writer.finish({f"as {name}": name for name in files})


def test_what_was_written_comes_out_and_stays() -> None:
    files = {"a": b"0123456789", "empty": b"", "b": bytes(range(256)) * 40}
    bundle = bundle_of(files)
    read = read_bundle(bundle.fileno())
    del bundle
    assert {name: bytes(view) for name, view in read.items()} == {f"as {name}": c for name, c in files.items()}


def test_each_file_begins_on_a_page_of_its_own() -> None:
    bundle = bundle_of({"a": b"0123456789", "b": b"x" * 5000, "c": b"y"})
    read = read_bundle(bundle.fileno())
    addresses = [np.frombuffer(view, np.uint8).ctypes.data for view in read.values()]
    assert [address % mmap.PAGESIZE for address in addresses] == [0, 0, 0]
    assert len(set(addresses)) == 3


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 100)
    before = open_fds()
    with pytest.raises(BundleError, match="101 bytes does not fit into the 100 bytes of memory left"):
        BundleWriter(101)
    assert open_fds() == before
    BundleWriter(100)


def test_a_sealed_bundle_cannot_be_changed() -> None:
    bundle = bundle_of({"a": b"0123456789"})
    with pytest.raises(PermissionError):
        os.pwrite(bundle.fileno(), b"x", 0)
    with pytest.raises(PermissionError):
        os.truncate(bundle.fileno(), 0)


def test_descriptors_go_with_the_last_reference() -> None:
    gc.collect()  # what other tests have left goes now, not between the two counts
    before = open_fds()
    bundle = bundle_of({"a": b"x"})
    writer = BundleWriter(1)
    assert open_fds() == before + 2
    del bundle, writer
    assert open_fds() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1),
        struct.pack("<Q", 2**63),
        b"[[" + struct.pack("<Q", 2),
        b"[[1]]" + struct.pack("<Q", 5),
        b'[["a",0,1]]' + struct.pack("<Q", 11),
        b'[["a",-1,1]]' + struct.pack("<Q", 12),
        b'[["a",0,"1"]]' + struct.pack("<Q", 13),
    ],
)
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    fd = sealed_file("test", content)
    try:
        with pytest.raises(BundleError):
            read_bundle(fd)
    finally:
        os.close(fd)


def ones() -> TestBatch:
    return array_batch(np.ones((1, 4), np.float32))


def weights_held(pid: int | str = "self") -> int:
    """Descriptors of external data that a process holds."""
    return sum(
        "gateway-weights" in str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()
    )


@pytest.mark.usefixtures("_hasty")
async def test_a_restarted_worker_loads_the_bytes_that_were_hashed_not_what_lies_on_disk_by_then(
    tmp_path: Path,
) -> None:
    directory = save(tmp_path / "1", scaled(2.0), "weights.bin")
    artifact = read_artifact(directory, "m", "1")
    async with pool_of(2) as (pool, _):
        model = await pool.load(artifact, LoadOptions(instances=2))
        del artifact
        save(directory, scaled(5.0), "weights.bin")
        for replica in model.replicas:
            assert floats(await ones_on(replica)).tolist() == [[8.0] * 3]
        replica = model.replicas[0]
        os.kill(pid_of(pool, "onnx-1"), signal.SIGKILL)
        await until(lambda: not replica.available)
        await until(lambda: replica.available)
        assert floats(await ones_on(replica)).tolist() == [[8.0] * 3]


async def ones_on(replica: OnnxReplica) -> Success:
    outcome = await run(replica, ones())
    assert isinstance(outcome, Success)
    return outcome


async def test_data_that_is_too_short_for_the_model_is_refused_at_load(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    os.truncate(directory / "weights.bin", 20)
    async with pool_of(1) as (pool, _):
        with pytest.raises(ModelError, match="do not hold what the model says"):
            await pool.load(read_artifact(directory, "m", "1"), LoadOptions(instances=1))
        assert weights_held() == 0
        pid = pid_of(pool, "onnx-1")
        await until(lambda: weights_held(pid) == 0)  # it answers first, and lets go then


async def test_an_unloaded_model_gives_its_memory_back(tmp_path: Path) -> None:
    directory = save(tmp_path / "1", scaled(), "weights.bin")
    relocated(directory / "model.onnx", "./weights.bin")
    async with pool_of(1) as (pool, _):
        model = await pool.load(read_artifact(directory, "m", "1"), LoadOptions(instances=1))
        assert weights_held() == 1
        await ones_on(model.replicas[0])
        pid = pid_of(pool, "onnx-1")
        await until(lambda: weights_held(pid) == 0)  # it answers first, and lets go then
        await model.unload()
        assert weights_held() == 0
