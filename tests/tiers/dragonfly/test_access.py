"""Who we are to a server, what it lets us do, and how it is known to be the right one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.blocks.record import CODEC_NONE
from kvpool.config.service import ServiceAddress, read_service
from kvpool.tiers.dragonfly.opening import SCHEMES
from kvpool.tiers.tier import KeyedTier, Moved, TierUnavailableError
from tests.tiers.dragonfly.servers import (
    PASSWORD,
    Between,
    Certificates,
    RedisProcess,
    certificates,
    client_of,
    tcp_server,
    tier_at,
    tier_of,
)
from tests.tiers.keyed_conformance import chain, found_of, holds, keys_of, put, tree_of

TREE = tree_of()
RIGHTS = "~kvpool:* +@read +@write +@connection +@transaction"
ALL_RIGHTS = f"{RIGHTS} +info +cluster|slots"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    with tcp_server(tmp_path_factory.mktemp("access")) as server:
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def address(server: RedisProcess) -> ServiceAddress:
    with client_of(server.folder) as client:
        client.flushall()
    return read_service(server.folder, schemes=SCHEMES)


def check_records(tier: KeyedTier) -> None:
    records = chain(4)
    put(tier, TREE, records[:2])
    put(tier, TREE, records[2:], keys_of(records[:2]))
    assert all(holds(tier, TREE, sealed) for sealed in records)
    tier.touch(TREE, keys_of(records), [CODEC_NONE])
    tier.drop(TREE, [found_of(records[3])])
    assert tier.erase(TREE.tenant, TREE.epoch + 1) == 3
    put(tier, TREE, records)
    assert tier.forget_model(TREE.fingerprint) == 4


def refusal_of(tier: KeyedTier) -> str:
    began_s = time.monotonic()
    with pytest.raises(TierUnavailableError) as refused:
        tier.find(TREE, keys_of(chain(1)), [CODEC_NONE])
    assert time.monotonic() - began_s < 4
    tier.close()
    assert PASSWORD not in str(refused.value)
    return refused.value.reason


# --- ACL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rights", [RIGHTS, ALL_RIGHTS])
def test_a_user_that_may_touch_our_keys_alone_is_enough(
    server: RedisProcess, address: ServiceAddress, rights: str
) -> None:
    with client_of(server.folder) as client:
        client.execute_command("ACL", "SETUSER", "cache", "reset", "on", f">{PASSWORD}", *rights.split())
    tier = tier_at(lambda: ServiceAddress(url=address.url, username="cache", password=PASSWORD))
    check_records(tier)
    tier.note_epoch(TREE.tenant, 7)
    assert tier.epoch_hint(TREE.tenant) == 7
    if rights == ALL_RIGHTS:
        assert tier.usage().used_bytes > 0
    else:
        assert tier.usage() == (0, 0)
        assert tier.info().program == "unknown"
    tier.close()


def test_a_user_that_may_not_write_reads_and_says_why_it_does_not_write(
    server: RedisProcess, address: ServiceAddress
) -> None:
    own = tier_at(lambda: address)
    put(own, TREE, chain(2))
    with client_of(server.folder) as client:
        client.execute_command("ACL", "SETUSER", "guest", "reset", "on", f">{PASSWORD}", "~kvpool:*", "+@read")
    tier = tier_at(lambda: ServiceAddress(url=address.url, username="guest", password=PASSWORD))
    records = chain(4)
    assert tier.find(TREE, keys_of(records[:2]), [CODEC_NONE]) == [found_of(sealed) for sealed in records[:2]]
    buffer = np.empty(records[0].record.nbytes, np.uint8)
    assert tier.get(TREE, [found_of(records[0])], [buffer]) == Moved([True])
    assert np.array_equal(buffer, records[0].record)
    moved = tier.put(TREE, records[1:], [])
    assert moved.done == [True, False, False]
    assert "NOPERM" in moved.fault
    with pytest.raises(TierUnavailableError, match="NOPERM"):
        tier.touch(TREE, keys_of(records), [CODEC_NONE])
    with pytest.raises(TierUnavailableError, match="NOPERM"):
        tier.drop(TREE, [found_of(records[0])])
    own.close()
    tier.close()


def test_the_database_that_the_url_names_is_used(server: RedisProcess, address: ServiceAddress) -> None:
    tier = tier_at(lambda: ServiceAddress(url=f"{address.url}/3", username="default", password=PASSWORD))
    put(tier, TREE, chain(2))
    with client_of(server.folder) as client:
        assert client.info("keyspace").keys() == {"db3"}
    tier.close()
    assert "database" in refusal_of(tier_at(lambda: ServiceAddress(url=f"{address.url}/cache")))


@pytest.mark.parametrize("url", ["redis://127.0.0.1:99999", "redis://a..b:6379", "redis://127.0.0.1:x"])
def test_an_address_that_cannot_be_is_an_outage(url: str) -> None:
    assert refusal_of(tier_at(lambda: ServiceAddress(url=url, password=PASSWORD)))


def test_a_server_that_repeats_the_password_does_not_get_it_into_our_messages(server: RedisProcess) -> None:
    text = f"-ERR unknown command 'AUTH', with args beginning with: '{PASSWORD}'\r\n".encode()
    with Between(server.port, answers=lambda data: text) as between:
        url = f"redis://127.0.0.1:{between.port}"
        assert "***" in refusal_of(tier_at(lambda: ServiceAddress(url=url, username="default", password=PASSWORD)))


def test_an_address_that_cannot_be_read_is_an_outage(tmp_path: Path) -> None:
    assert "url" in refusal_of(tier_of(tmp_path / "nothing"))


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_tls_is_verified_against_the_authority_of_the_service(
    server: RedisProcess, address: ServiceAddress, made: Certificates
) -> None:
    with Between(server.port, tls=made) as front:
        url = f"redis://localhost:{front.port}"
        good = ServiceAddress(url=url, username="default", password=PASSWORD, ca_file=made.authority)
        tier = tier_at(lambda: good, tls=True)
        check_records(tier)
        tier.close()
        unknown = ServiceAddress(url=url, username="default", password=PASSWORD)
        assert "certificate" in refusal_of(tier_at(lambda: unknown, tls=True)).lower()


def test_a_certificate_of_another_host_is_refused(
    server: RedisProcess, address: ServiceAddress, made: Certificates
) -> None:
    with Between(server.port, tls=made) as front:
        url = f"rediss://127.0.0.1:{front.port}"
        other = ServiceAddress(url=url, username="default", password=PASSWORD, ca_file=made.authority)
        assert "certificate" in refusal_of(tier_at(lambda: other)).lower()


def test_large_records_go_both_ways_through_tls(
    server: RedisProcess, address: ServiceAddress, made: Certificates
) -> None:
    with Between(server.port, tls=made) as front:
        url = f"rediss://localhost:{front.port}"
        good = ServiceAddress(url=url, username="default", password=PASSWORD, ca_file=made.authority)
        tier = tier_at(lambda: good)
        records = chain(12, 3 << 20)
        put(tier, TREE, records)
        buffers = [np.empty(sealed.record.nbytes, np.uint8) for sealed in records]
        assert tier.get(TREE, [found_of(sealed) for sealed in records], buffers) == Moved([True] * 12)
        assert all(np.array_equal(buffer, sealed.record) for buffer, sealed in zip(buffers, records, strict=True))
        tier.close()


def test_who_speaks_in_the_clear_where_tls_is_expected_or_the_reverse_is_refused_in_time(
    server: RedisProcess, address: ServiceAddress, made: Certificates
) -> None:
    clear = ServiceAddress(url=address.url, username="default", password=PASSWORD, ca_file=made.authority)
    assert refusal_of(tier_at(lambda: clear, tls=True, budget_s=1.0))
    with Between(server.port, tls=made) as front:
        url = f"redis://localhost:{front.port}"
        assert refusal_of(tier_at(lambda: ServiceAddress(url=url, password=PASSWORD), budget_s=1.0))


def test_no_password_is_on_a_command_line_or_in_a_text_of_ours(server: RedisProcess, address: ServiceAddress) -> None:
    tier = tier_at(lambda: address)
    assert tier.find(TREE, keys_of(chain(1)), [CODEC_NONE]) == [None]
    assert PASSWORD not in repr(tier) + repr(address) + str(vars(tier))
    assert PASSWORD.encode() not in Path("/proc/self/cmdline").read_bytes()
    tier.close()
