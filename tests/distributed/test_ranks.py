# SPDX-License-Identifier: Apache-2.0
"""The pool of ranks: results, and every way in which a rank can fail, each within its time."""

import os
import signal
import time

import pytest
import torch
from torch import distributed

from lrc_kernels.testing import RankError, RankPool


def sum_of_ranks(offset):
    x = torch.tensor([float(distributed.get_rank() + offset)])
    distributed.all_reduce(x)
    return distributed.get_rank(), x.item()


def raise_on(rank):
    if distributed.get_rank() == rank:
        raise KeyError(f"planted on rank {rank}")
    return "fine"


def raise_while_the_other_waits():
    if distributed.get_rank() == 0:
        raise KeyError("planted")
    distributed.barrier()


def die_on(rank):
    if distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def hang_on(rank):
    if distributed.get_rank() == rank:
        time.sleep(600)
    return "fine"


def unpicklable():
    return lambda: None


def test_all_reduce(rank_pool):
    assert rank_pool.run(sum_of_ranks, 10) == [(0, 21.0), (1, 21.0)]


def test_exception_names_the_rank_and_leaves_the_pool_whole(rank_pool):
    with pytest.raises(RankError, match=r"rank 1 failed in raise_on(.|\n)*planted on rank 1") as caught:
        rank_pool.run(raise_on, 1)
    assert caught.value.rank == 1 and rank_pool.broken is None
    with pytest.raises(RankError, match="rank 0 failed in unpicklable"):
        rank_pool.run(unpicklable)
    assert rank_pool.run(sum_of_ranks, 0) == [(0, 1.0), (1, 1.0)]


def test_refuses_what_other_processes_cannot_find(rank_pool):
    with pytest.raises(TypeError, match="fn must be a function, got builtin"):
        rank_pool.run(len)
    with pytest.raises(ValueError, match="top level"):
        rank_pool.run(lambda: None)
    with pytest.raises(ValueError, match="world_size must be >= 1, got 0"):
        RankPool(0)


def test_every_way_to_break_a_pool():
    with RankPool(2, timeout=30) as pool:
        started = time.monotonic()
        pool.start()
        start_s = time.monotonic() - started
        with pytest.raises(RankError, match=r"rank 1 died in die_on: killed by signal 9") as caught:
            pool.run(die_on, 1)
        assert caught.value.rank == 1
        with pytest.raises(RankError, match=r"the pool is broken \(rank 1 died\); call restart"):
            pool.run(sum_of_ranks, 0)
        pool.restart()
        started = time.monotonic()
        with pytest.raises(RankError, match=r"rank 0 did not answer within 1 s in hang_on") as caught:
            pool.run(hang_on, 0, timeout=1)
        assert caught.value.rank == 0 and time.monotonic() - started < 1 + max(10, start_s)
        pool.restart()
        with pytest.raises(RankError, match=r"rank 0 failed in raise_while(.|\n)*planted"):
            pool.run(raise_while_the_other_waits)
        assert pool.broken == "rank 1 waited for rank 0, which had failed"
