"""Memory is lent again only when nobody sees it any more."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from kvpool.adapters.transformers.host_memory import HostMemory


def test_memory_that_nobody_sees_is_lent_again() -> None:
    memory = HostMemory()
    first = memory.take(1000)
    place = first.data_ptr()
    del first
    assert memory.take(900).data_ptr() == place


def test_memory_of_which_any_view_lives_is_not_lent_again() -> None:
    memory = HostMemory()
    ways_to_see: list[Callable[[torch.Tensor], Any]] = [
        lambda tensor: tensor,
        lambda tensor: tensor[5:7],
        lambda tensor: tensor.view(torch.float32).view(10, 25)[3, 4:9],
        lambda tensor: tensor.detach().numpy()[::2],
        lambda tensor: tensor.untyped_storage(),
    ]
    for see in ways_to_see:
        taken = memory.take(1000)
        place, view = taken.data_ptr(), see(taken)
        del taken
        assert memory.take(1000).data_ptr() != place
        del view


def test_memory_that_is_too_small_or_far_too_large_is_let_go() -> None:
    memory = HostMemory()
    assert len(memory.take(10)) == 10
    assert len(memory.take(1000)) == 1000
    large = memory.take(1 << 20)
    assert len(large) == 1 << 20
    del large
    assert memory.take(100).untyped_storage().nbytes() == 100


def test_threads_never_see_each_other_s_memory() -> None:
    memory, shared = HostMemory(), []

    def use(number: int) -> None:
        for _ in range(200):
            taken = memory.take(4096).fill_(number)
            if not bool((taken == number).all()):
                shared.append(number)
            del taken

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared


def test_nothing_can_be_taken_too() -> None:
    assert len(HostMemory().take(0)) == 0
