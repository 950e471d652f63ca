import numpy as np
import pytest

from vivace.base.errors import InternalError
from vivace.runtime.buffer import PAGE_BYTES, Buffer


@pytest.mark.parametrize("n_bytes", [0, 1, 63, 64, 4097, (2 << 20) - 1, 2 << 20, 5_000_001])
def test_a_buffer_is_aligned_zeroed_and_writable(n_bytes: int) -> None:
    buffer = Buffer(n_bytes)
    assert buffer.address % 64 == 0
    if n_bytes >= 2 << 20:
        assert buffer.address % (2 << 20) == 0
    assert buffer.bytes.nbytes == n_bytes
    assert not buffer.bytes.any()
    if n_bytes:
        assert buffer.bytes.ctypes.data == buffer.address
        buffer.bytes[-1] = 7
        assert buffer.bytes[-1] == 7


def test_views_share_the_memory_and_outlive_release() -> None:
    buffer = Buffer(3 << 20)
    view = buffer.view(np.float32, (4, 5), 128)
    view[:] = 2.5
    assert buffer.bytes[128:132].view(np.float32)[0] == 2.5
    buffer.release()
    assert view.sum() == 50
    with pytest.raises(InternalError):
        _ = buffer.bytes


@pytest.mark.parametrize(("shape", "offset"), [((3,), 4), ((2,), -8), ((1,), 17)])
def test_a_view_outside_is_refused(shape: tuple[int, ...], offset: int) -> None:
    with pytest.raises(InternalError):
        Buffer(16).view(np.int64, shape, offset)
    with pytest.raises(InternalError):
        Buffer(-1)


@pytest.mark.parametrize("n_bytes", [1, 5 << 20])
def test_pages_for_several_threads(n_bytes: int) -> None:
    buffer = Buffer(n_bytes, by_page=True)
    assert buffer.address % PAGE_BYTES == 0 and not buffer.bytes.any()


@pytest.mark.parametrize("n_bytes", [1 << 62, 1 << 80])
def test_more_than_there_is(n_bytes: int) -> None:
    with pytest.raises(MemoryError):
        Buffer(n_bytes)
