"""Areas grow, never shrink, and never show memory that is not there."""

from __future__ import annotations

import fcntl
import os

import pytest

from gateway.workers.shm import Area, AreaError, Buffer, create_area, read_file, sealed_file
from tests.workers.rig import open_fds


def test_both_sides_see_the_same_bytes_after_growth() -> None:
    fd = create_area("test")
    owner, other = Area(fd, writable=True), Area(os.dup(fd), writable=False)
    for size in (10, 5000, 100_000):
        owner.reserve(size)
        owner.view[size - 1] = size % 251
        other.follow(size)
        assert other.view[size - 1] == size % 251
    assert other.view[9] == 10
    owner.close()
    other.close()


def test_growth_at_least_doubles() -> None:
    area = Area(create_area("test"), writable=True)
    area.reserve(1)
    first = area.size
    area.reserve(first + 1)
    assert area.size >= 2 * first
    area.close()


def test_an_area_cannot_shrink() -> None:
    area = Area(create_area("test"), writable=True)
    area.reserve(8192)
    with pytest.raises(PermissionError):
        os.ftruncate(area.fd, 4096)
    area.close()


def test_following_what_does_not_exist_is_an_error() -> None:
    area = Area(create_area("test"), writable=False)
    with pytest.raises(AreaError, match="4096 bytes was announced, 0 exist"):
        area.follow(4096)
    area.close()


def test_the_reading_side_cannot_write() -> None:
    fd = create_area("test")
    os.truncate(fd, 4096)
    area = Area(fd, writable=False)
    area.follow(4096)
    with pytest.raises(TypeError):
        area.view[0] = 1
    area.close()


def test_a_view_outlives_growth_and_close() -> None:
    area = Area(create_area("test"), writable=True)
    area.reserve(100)
    area.view[:3] = b"abc"
    view = area.view[:3]
    area.reserve(1_000_000)
    assert bytes(area.view[:3]) == b"abc"
    area.close()
    assert bytes(view) == b"abc"


def test_a_sealed_file_is_what_was_written_for_ever() -> None:
    content = os.urandom(10_000)
    fd = sealed_file("test", content)
    assert read_file(fd) == content
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 20_000)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
    os.close(fd)


def test_empty_content_is_content() -> None:
    fd = sealed_file("test", b"")
    assert read_file(fd) == b""
    os.close(fd)


def test_closing_gives_everything_back() -> None:
    before = open_fds()
    for identity in range(50):
        buffer = Buffer.create(identity)
        buffer.input.reserve(10_000)
        buffer.output.follow(0)
        buffer.close()
        buffer.close()
    assert open_fds() <= before  # what other tests left may be collected meanwhile
