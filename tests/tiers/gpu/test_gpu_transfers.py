"""Copies between host and device: whole, in order with the engine's work, within deadlines and bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import numpy as np
import pytest
import torch

from kvpool.blocks.layout import PAGE_BYTES
from kvpool.errors import InputError
from kvpool.tiers.extents import Bytes
from kvpool.tiers.gpu.cpu import CpuDevice
from kvpool.tiers.gpu.device import Device, Stream
from kvpool.tiers.gpu.tier import GpuTier
from kvpool.tiers.gpu.transfer import Traffic, Transfer
from kvpool.tiers.ram import RamTier
from kvpool.tiers.tier import TierUnavailableError

from .devices import EVERY_DEVICE, GARBAGE, LateDevice

MIB = 1 << 20
PAYLOAD = 6 * PAGE_BYTES + 100
RECORD = 8 * PAGE_BYTES


def tier_on(device: Device, *, streams: int = 4, buffer_bytes: int = 5 * PAGE_BYTES, buffers: int = 3) -> GpuTier:
    """Staging buffers are small and few: payloads come in pieces, and wait for each other."""
    return GpuTier(
        4 * MIB, device=device, streams=streams, margin_bytes=0, staging_buffer_bytes=buffer_bytes,
        staging_buffers=buffers,
    )  # fmt: skip


def payloads(count: int, seed: int = 0, nbytes: int = PAYLOAD) -> list[Bytes]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, nbytes), np.uint8))


def finish(transfer: Transfer) -> None:
    assert transfer.wait(30)


def downloaded(tier: GpuTier, places: list[int]) -> list[Bytes]:
    into = [np.zeros(PAYLOAD, np.uint8) for _ in places]
    finish(tier.download(places, into))
    return into


def equal(left: list[Bytes], right: list[Bytes]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_payloads_go_up_and_come_back(make_device: Callable[[], Device], streams: int) -> None:
    tier = tier_on(make_device(), streams=streams)
    places = tier.allocate_many(RECORD, 30, "a")
    sent = payloads(30)
    finish(tier.upload(places, sent))
    assert all(
        np.array_equal(tier.payload(place)[:PAYLOAD].cpu().numpy(), payload)
        for place, payload in zip(places, sent, strict=True)
    )
    assert equal(downloaded(tier, places), sent)
    assert tier.stats().uploads == tier.stats().downloads == Traffic(1, 30 * PAYLOAD)
    tier.close()


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_payloads_of_all_lengths_arrive_and_touch_nothing_beyond(make_device: Callable[[], Device]) -> None:
    tier = tier_on(make_device())
    lengths = [1, PAGE_BYTES - 1, PAGE_BYTES, 5 * PAGE_BYTES + 1, 7 * PAGE_BYTES]
    places = tier.allocate_many(RECORD, len(lengths), "a")
    sent = [payload[:length] for payload, length in zip(payloads(5, nbytes=RECORD), lengths, strict=True)]
    finish(tier.upload(places, sent))
    for place, payload in zip(places, sent, strict=True):
        record = tier.record(place).cpu().numpy()
        assert not record[:PAGE_BYTES].any()
        assert np.array_equal(record[PAGE_BYTES : PAGE_BYTES + payload.nbytes], payload)
        assert not record[PAGE_BYTES + payload.nbytes :].any()
    tier.close()


def test_memory_of_a_pinned_ram_tier_and_other_memory_go_together_and_only_the_latter_is_staged() -> None:
    device = CpuDevice()
    tier = tier_on(device)
    ram = RamTier(4 * MIB)
    slots = ram.allocate_many(RECORD, 20)
    for slot in slots[:10]:
        device.register(ram.record(slot).ctypes.data, RECORD)
    sources = [ram.record(slot)[PAGE_BYTES : PAGE_BYTES + PAYLOAD] for slot in slots[:10]]
    for source, payload in zip(sources, payloads(10), strict=True):
        source[:] = payload
    places = tier.allocate_many(RECORD, 20, "a")
    finish(tier.upload(places[:10], sources))
    assert tier.stats().staging_bytes == 0
    finish(tier.upload(places[10:], payloads(10, seed=1)))
    assert tier.stats().staging_bytes > 0
    mixed = [*sources, *[np.zeros(PAYLOAD, np.uint8) for _ in range(10)]]
    for source in sources:
        source[:] = 0
    order = Random(1).sample(range(20), 20)
    finish(tier.download([places[at] for at in order], [mixed[at] for at in order]))
    assert equal(mixed, payloads(10) + payloads(10, seed=1))
    tier.close()
    ram.close()


def test_read_only_memory_is_uploaded_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    tier = tier_on(LateDevice(seed=1, direct=True))
    [place] = tier.allocate_many(RECORD, 1, "a")
    source = np.frombuffer(bytes(range(200)), np.uint8)
    finish(tier.upload([place], [source]))
    assert tier.payload(place)[:200].tolist() == list(range(200))
    assert len(recwarn) == 0
    tier.close()


def test_slots_can_be_written_wherever_they_were_allocated() -> None:
    tier = tier_on(CpuDevice())
    with torch.inference_mode():
        places = tier.allocate_many(RECORD, 3, "a")
        finish(tier.upload(places, payloads(3)))
    with torch.enable_grad():
        values = torch.arange(8.0, requires_grad=True)
        for place in places:
            tier.payload(place)[:32].view(torch.float32).copy_(values)
    finish(tier.upload(places, payloads(3, seed=1)))
    assert equal(downloaded(tier, places), payloads(3, seed=1))
    tier.close()


# --- errors of the caller ---------------------------------------------------------------------------------------------


def test_what_cannot_be_copied_is_refused_and_nothing_is() -> None:
    tier = tier_on(CpuDevice())
    place, other = tier.allocate_many(RECORD, 2, "a")
    tier.drop([other])
    fine = payloads(1)[0]
    with pytest.raises(ValueError, match="not in use"):
        tier.upload([place, other], [fine, fine])
    with pytest.raises(InputError, match="has room for"):
        tier.upload([place], [np.zeros(RECORD, np.uint8)])
    with pytest.raises(InputError, match="0 bytes"):
        tier.upload([place], [fine[:0]])
    with pytest.raises(InputError, match="contiguous"):
        tier.upload([place], [fine[::2]])
    with pytest.raises(InputError, match="uint8"):
        tier.upload([place], [np.zeros(4, np.float32)])
    with pytest.raises(InputError, match="written"):
        tier.download([place], [np.frombuffer(bytes(100), np.uint8)])
    with pytest.raises(ValueError, match="places"):
        tier.upload([place, place], [fine])
    assert not tier.record(place).any()
    tier.drop([place])
    assert tier.used_bytes == 0, "no place is held by what was refused"
    tier.close()
    with pytest.raises(TierUnavailableError, match="closed"):
        tier.upload([place], [fine])


# --- order with the engine's work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_a_download_waits_for_the_kernels_that_write_its_place(direct: bool) -> None:
    device = LateDevice(direct=direct)
    tier = tier_on(device)
    [place] = tier.allocate_many(RECORD, 1, "a")
    payload = tier.payload(place)
    device.queue(device.engine_stream, lambda: payload.fill_(9))
    into = np.zeros(PAYLOAD, np.uint8)
    transfer = tier.download([place], [into])
    device.run(*device.streams[1:])
    assert not transfer.done
    device.run()
    while not transfer.done:
        device.run()
    assert (into == 9).all()
    tier.close()


@pytest.mark.parametrize("direct", [True, False])
def test_an_upload_waits_for_the_kernels_that_read_what_its_place_held_before(direct: bool) -> None:
    device = LateDevice(direct=direct)
    tier = tier_on(device)
    [place] = tier.allocate_many(RECORD, 1, "a")
    old = tier.payload(place)
    read: list[torch.Tensor] = []
    device.queue(device.engine_stream, lambda: old.fill_(5))
    device.queue(device.engine_stream, lambda: read.append(old.clone()))
    tier.drop([place])
    [again] = tier.allocate_many(RECORD, 1, "a")
    assert again == place
    transfer = tier.upload([again], payloads(1))
    device.run(*device.streams[1:])
    assert not transfer.done
    device.run()
    while not transfer.done:
        device.run()
    assert (read[0] == 5).all()
    assert np.array_equal(tier.payload(again)[:PAYLOAD].numpy(), payloads(1)[0])
    tier.close()


def test_an_upload_waits_for_other_streams_on_which_places_were_dropped() -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device)
    [place] = tier.allocate_many(RECORD, 1, "a")
    old = tier.payload(place)
    side = device.new_stream()
    read: list[torch.Tensor] = []
    device.run()
    with device.on(side):
        device.queue(side, lambda: old.fill_(5))
        device.queue(side, lambda: read.append(old.clone()))
        tier.drop([place])
    [again] = tier.allocate_many(RECORD, 1, "a")
    transfer = tier.upload([again], payloads(1))
    device.run(*[stream for stream in device.streams if stream is not side])
    assert not transfer.done
    device.run()
    assert transfer.done
    assert (read[0] == 5).all()
    tier.close()


@pytest.mark.parametrize("dropped_on_the_side", [True, False])
def test_kernels_of_another_stream_wait_for_those_that_read_what_their_place_held_before(
    dropped_on_the_side: bool,
) -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device)
    [place] = tier.allocate_many(RECORD, 1, "a")
    device.run()
    payload = tier.payload(place).numpy()
    side = device.new_stream()
    reader, writer = (side, device.engine_stream) if dropped_on_the_side else (device.engine_stream, side)
    read: list[set[int]] = []
    with device.on(reader):
        device.queue(reader, lambda: payload.fill(5))
        device.queue(reader, lambda: read.append(set(payload.tolist())))
        tier.drop([place])
    with device.on(writer):
        assert tier.allocate_many(RECORD, 1, "a") == [place]
        device.queue(writer, lambda: payload.fill(6))
    device.run(writer)
    device.run()
    assert read == [{5}]
    assert (payload == 6).all()
    tier.close()


def test_an_upload_runs_beside_what_the_engine_has_queued() -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device)
    places = tier.allocate_many(RECORD, 3, "a")
    device.run()
    done: list[int] = []
    device.queue(device.engine_stream, lambda: done.append(1))
    transfer = tier.upload(places, payloads(3))
    device.run(*device.streams[1:])
    assert transfer.done
    assert done == []
    tier.close()


def test_clearing_waits_for_the_former_owner_and_everybody_waits_for_the_clearing() -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device)
    [place] = tier.allocate_many(RECORD, 1, "a")
    old = tier.payload(place)
    device.queue(device.engine_stream, lambda: old.fill_(5))
    tier.drop([place])
    side = device.new_stream()
    with device.on(side):
        [again] = tier.allocate_many(RECORD, 1, "b")
        new = tier.payload(again)
        device.queue(side, lambda: new[:10].fill_(6))
    transfer = tier.upload([again], [np.full(5, 7, np.uint8)])
    seen: list[list[int]] = []
    device.queue(device.engine_stream, lambda: seen.append(sorted(set(new[20:].tolist()))))
    device.run(side)
    device.run(*device.streams[1:])
    assert not transfer.done
    device.run()
    assert transfer.done
    assert seen == [[0]]
    assert new[5:10].tolist() == [6] * 5
    tier.close()


def test_what_is_queued_after_a_join_sees_the_upload() -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device)
    places = tier.allocate_many(RECORD, 6, "a")
    transfer = tier.upload(places, payloads(6))
    assert transfer.join(0)
    seen: list[Bytes] = []

    def read(payload: torch.Tensor) -> None:
        seen.append(payload[:PAYLOAD].numpy().copy())

    for place in places:
        device.queue(device.engine_stream, partial(read, tier.payload(place)))
    device.run(device.engine_stream)
    assert seen == []
    device.run()
    assert equal(seen, payloads(6))
    tier.close()


def test_a_join_says_so_where_not_everything_could_be_queued() -> None:
    tier = tier_on(LateDevice(), buffers=1)
    places = tier.allocate_many(RECORD, 6, "a")
    assert not tier.upload(places, payloads(6)).join(0)


# --- deadlines and bounds ---------------------------------------------------------------------------------------------


class Time:
    """A clock that moves while somebody sleeps, and by a microsecond with each look."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


def timed_tier(device: LateDevice, time: Time) -> GpuTier:
    return GpuTier(
        4 * MIB, device=device, margin_bytes=0, streams=2, staging_buffer_bytes=4 * PAGE_BYTES, staging_buffers=2,
        budget_s=2.0, clock=time, pause=time.sleep,
    )  # fmt: skip


def test_a_wait_ends_at_its_deadline_and_the_transfer_goes_on() -> None:
    device, time = LateDevice(), Time()
    tier = timed_tier(device, time)
    places = tier.allocate_many(RECORD, 4, "a")
    transfer = tier.upload(places, payloads(4))
    assert not transfer.wait(0.25)
    assert 0.25 <= time.now < 0.26
    assert max(time.slept) <= 1e-3
    assert not transfer.done
    while not transfer.done:
        device.run()
    assert transfer.wait(0)
    assert all(
        np.array_equal(tier.payload(place)[:PAYLOAD].numpy(), payload)
        for place, payload in zip(places, payloads(4), strict=True)
    )
    tier.close()


def test_a_place_that_is_dropped_during_a_transfer_is_nobodys_until_that_has_ended() -> None:
    device = LateDevice()
    tier = tier_on(device)
    places = tier.allocate_many(RECORD, 1000, "a")
    transfer = tier.upload(places[:2], payloads(2))
    tier.drop(places[:2])
    with pytest.raises(ValueError, match="dropped"):
        tier.record(places[0])
    assert [tier.bytes_of(place) for place in places[1:3]] == [0, RECORD]
    with pytest.raises(ValueError, match=r".+"):
        tier.drop(places[:1])
    assert tier.get(places[:1], [np.zeros(RECORD, np.uint8)]) == [False]
    assert tier.allocate(RECORD, "a") is None
    while not transfer.done:
        device.run()
    assert sorted(tier.allocate_many(RECORD, 10, "a")) == sorted(places[:2])
    tier.close()


def test_the_end_is_told_once_when_the_memory_is_no_longer_needed() -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device)
    places = tier.allocate_many(RECORD, 3, "a")
    ended: list[str] = []
    transfer = tier.upload(places, payloads(3), ended=lambda: ended.append("up"))
    assert ended == []
    device.run()
    assert transfer.done
    assert transfer.done
    transfer.cancel()
    tier.advance()
    tier.close()
    assert ended == ["up"]


def test_a_transfer_that_nobody_looks_at_moves_with_the_others() -> None:
    device = LateDevice(seed=5)
    tier = tier_on(device, buffers=1)
    places = tier.allocate_many(RECORD, 8, "a")
    ended: list[int] = []
    for number in range(3):
        tier.upload(places[2 * number : 2 * number + 2], payloads(2, seed=number), ended=lambda: ended.append(1))
    finish(tier.upload(places[6:], payloads(2, seed=3)))
    assert len(ended) == 3
    assert equal(downloaded(tier, places), [payload for seed in range(4) for payload in payloads(2, seed=seed)])
    tier.close()


def test_staging_buffers_are_few_and_none_is_used_again_before_its_copy_is_done() -> None:
    device = LateDevice(seed=11)
    tier = tier_on(device, buffer_bytes=3 * PAGE_BYTES, buffers=2)
    places = tier.allocate_many(RECORD, 40, "a")
    transfers = [tier.upload(places[at : at + 4], payloads(4, seed=at)) for at in range(0, 40, 4)]
    for transfer in transfers:
        finish(transfer)
    assert tier.stats().staging_bytes == 2 * 3 * PAGE_BYTES
    assert equal(downloaded(tier, places), [payload for at in range(0, 40, 4) for payload in payloads(4, seed=at)])
    tier.close()


def test_a_cancelled_download_leaves_the_hosts_memory_alone() -> None:
    device = LateDevice()
    tier = tier_on(device)
    places = tier.allocate_many(RECORD, 8, "a")
    into = [np.full(PAYLOAD, 1, np.uint8) for _ in places]
    transfer = tier.download(places, into)
    transfer.cancel()
    while not transfer.done:
        device.run()
    assert all((target == 1).all() for target in into)
    assert equal(downloaded_by_running(tier, device, places), [np.zeros(PAYLOAD, np.uint8)] * 8), "buffers came back"
    tier.close()


def downloaded_by_running(tier: GpuTier, device: LateDevice, places: list[int]) -> list[Bytes]:
    into = [np.full(PAYLOAD, GARBAGE, np.uint8) for _ in places]
    transfer = tier.download(places, into)
    while not transfer.done:
        device.run()
    return into


def test_a_device_that_does_nothing_costs_put_and_get_their_budget_and_no_more() -> None:
    device, time = LateDevice(seed=1), Time()
    tier = timed_tier(device, time)
    record = np.full(RECORD, 3, np.uint8)
    [place] = tier.put([record])
    assert place is not None
    device.hung = True
    began = time.now
    with pytest.raises(TierUnavailableError, match="nothing for 2 s"):
        tier.put([record])
    assert time.now - began < 2.1
    buffer = np.full(RECORD, 1, np.uint8)
    with pytest.raises(TierUnavailableError, match="nothing for 2 s"):
        tier.get([place], [buffer])
    device.hung = False
    device.run()
    tier.advance()
    assert (buffer == 1).all(), "a buffer is left alone once the call has ended"
    assert tier.used_bytes == RECORD, "what was not stored is free again"
    assert tier.get([place], [buffer]) == [True]
    assert (buffer == 3).all()
    tier.close()


def test_a_device_that_is_slow_but_moves_is_waited_for() -> None:
    device, time = LateDevice(), Time()

    def sleep(seconds: float) -> None:
        time.sleep(seconds + 1.0)
        for stream in device.streams * 4:
            device.step(stream)

    tier = GpuTier(
        4 * MIB, device=device, margin_bytes=0, streams=2, staging_buffer_bytes=4 * PAGE_BYTES, staging_buffers=2,
        budget_s=60.0, clock=time, pause=sleep,
    )  # fmt: skip
    records = [np.full(RECORD, number, np.uint8) for number in range(40)]
    places = tier.put(records)
    assert None not in places
    assert time.now > 60.0
    tier.close()


def test_closing_waits_for_transfers_and_gives_up_those_that_hang() -> None:
    device, time = LateDevice(direct=True), Time()
    tier = timed_tier(device, time)
    places = tier.allocate_many(RECORD, 4, "a")
    ended: list[int] = []
    transfer = tier.upload(places, payloads(4), ended=lambda: ended.append(1))
    device.hung = True
    tier.close()
    assert 5.0 <= time.now < 5.1
    assert ended == [1]
    assert transfer.done
    with pytest.raises(TierUnavailableError, match="closed"):
        transfer.wait(0)
    lanes = set(device.streams[1:])
    assert all(lanes <= streams for _, streams in device.retired), "memory that may still be written is not used again"
    assert device.retired


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("after", range(4))
def test_an_interrupt_in_the_middle_of_copies_never_makes_them_seem_done(direct: bool, after: int) -> None:
    class Interrupted(LateDevice):
        left = 1 << 30

        def queue(self, stream: Stream, work: Callable[[], object]) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            super().queue(stream, work)

    device = Interrupted(direct=direct)
    tier = tier_on(device, streams=2, buffers=20)
    places = tier.allocate_many(RECORD, 4, "a")
    device.run()
    other = tier.upload(places[:1], payloads(1))
    device.left = after
    with pytest.raises(KeyboardInterrupt):
        tier.upload(places, payloads(4))
    device.left = 1 << 30
    [transfer] = {*tier._transfers._open} - {other}
    while not transfer.done:
        device.run()
    with pytest.raises(TierUnavailableError, match="broken off"):
        transfer.wait(0)
    assert other.wait(1)
    tier.drop(places)
    assert tier.used_bytes == 0, "every place is free again"
    tier.close()


def test_direct_copies_are_all_queued_at_once_on_any_number_of_streams() -> None:
    device = LateDevice(direct=True)
    tier = tier_on(device, streams=64)
    places = tier.allocate_many(RECORD, 100, "a")
    transfer = tier.upload(places, payloads(100))
    assert transfer.join(0)
    device.run()
    assert transfer.done
    tier.close()


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_device", EVERY_DEVICE)
def test_transfers_of_many_threads_never_mix(make_device: Callable[[], Device]) -> None:
    tier = tier_on(make_device())

    def work(seed: int) -> int:
        random = Random(seed)
        done = 0
        for turn in range(12):
            places = tier.allocate_many(RECORD, random.randrange(1, 8), f"owner {seed}")
            sent = payloads(len(places), seed=1000 * seed + turn)
            if places:
                finish(tier.upload(places, sent))
                assert equal(downloaded(tier, places), sent)
                done += len(places)
            tier.drop(places)
        return done

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(6)))
    assert tier.used_bytes == 0
    assert tier.stats().in_flight == 0
    tier.slab.check_integrity()
    tier.close()


def test_one_transfer_may_be_waited_for_by_many_and_ends_once() -> None:
    device = LateDevice(seed=2)
    tier = tier_on(device)
    places = tier.allocate_many(RECORD, 20, "a")
    ended: list[int] = []
    ready = threading.Barrier(4)
    transfer = tier.upload(places, payloads(20), ended=lambda: ended.append(1))

    def wait(_: int) -> bool:
        ready.wait()
        return transfer.wait(30)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(wait, range(4)))
    assert ended == [1]
    tier.close()
