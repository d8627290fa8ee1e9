"""The pool of threads that all kernels share: every piece once, whoever asks, and after a fork."""

import ctypes
import os
import threading

import pytest
import torch

from openqwen.model import kernels

squares = kernels.function("openqwen_pool_squares", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
set_threads = kernels.function("openqwen_set_threads", ctypes.c_int32)
pytestmark = pytest.mark.skipif(squares is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def _restore():
    yield
    set_threads(torch.get_num_threads())


def right(count: int = 1_000, grain: int = 7) -> bool:
    out = torch.full((count + 1,), -1, dtype=torch.int64)
    squares(out.data_ptr(), count, grain)
    return torch.equal(out[:count], torch.arange(count) ** 2) and out[count] == -1


def test_every_piece_is_done_once_on_any_number_of_threads():
    for threads in (1, 2, 5, 3, 8, 1, 2):
        set_threads(threads)
        assert all(
            right(count, grain)
            for count in (0, 1, 2, 63, 1_000)
            for grain in (1, 7, 64)
            for _ in range(20)
        )


def test_calls_from_many_threads_at_once():
    set_threads(3)
    results: list[bool] = []
    callers = [
        threading.Thread(target=lambda: results.extend(right() for _ in range(200)))
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [True] * 800


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own():
    set_threads(3)
    assert right()
    child = os.fork()
    if child == 0:
        os._exit(0 if all(right() for _ in range(50)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right()


def test_the_pool_is_as_wide_as_torch():
    kernels.follow_torch()
    assert kernels.pool().threads == torch.get_num_threads()
