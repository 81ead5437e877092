"""Collectives over topologies: ports of hosts, switches, algorithms, and the spans of groups."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from autopar.cluster.ring import ring
from autopar.cluster.span import Span, span
from autopar.cluster.spec import Cluster
from autopar.cost.collectives import collective_s, hierarchical_all_reduce_s
from autopar.cost.constants import Constants, constants_of

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
# Every share is 1 and nothing has a least time, so that figures can be had by hand.
PLAIN = Constants(link_share=1.0, network_share=1.0, collective_s=0.0)


def cluster(hosts: int, width: int = 8, **changes) -> Cluster:
    return replace(Cluster.preset("a100-80gb", hosts=hosts, devices_per_host=width), **changes)


def without_latency(made: Cluster) -> Cluster:
    return replace(made, intra=replace(made.intra, latency_s=0.0), inter=replace(made.inter, latency_s=0.0))


@pytest.mark.parametrize("seed", range(200))
def test_a_span_counts_what_a_walk_counts(seed: int) -> None:
    rng = random.Random(seed)
    made = cluster(rng.randint(1, 40), rng.choice([1, 2, 4, 6, 8]), hosts_per_switch=rng.choice([0, 1, 2, 4]))
    if rng.random() < 0.7:  # as meshes have them
        step = rng.choice([1, 1, 2, 4, 8, 3])
        start = rng.randrange(step)
        ranks = tuple(range(start, made.world_size, step))[: rng.randint(1, 64)]
    else:
        ranks = tuple(sorted(rng.sample(range(made.world_size), rng.randint(1, min(40, made.world_size)))))
    hosts = [rank // made.devices_per_host for rank in ranks]
    leaves = {host // (made.hosts_per_switch or made.num_hosts) for host in hosts}
    most = max(hosts.count(host) for host in set(hosts))
    found = span(made, ranks)
    assert (found.ranks, found.hosts, found.per_host) == (len(ranks), len(set(hosts)), most)
    assert found.leaves == len(leaves)


def test_a_span_of_many_ranks_takes_no_walk() -> None:
    made = cluster(2048)
    assert span(made, tuple(range(0, 16384, 8))) == Span(2048, 2048, 1, 1)
    assert span(made, tuple(range(16384))) == Span(16384, 2048, 8, 1)


def test_a_ring_over_hosts_leaves_by_as_many_ports_as_a_host_has_ranks_in_it() -> None:
    made = without_latency(cluster(4))
    port, size = made.inter.bandwidth_bytes_per_s, 1e9
    for per_host in (1, 2, 4, 8):
        ranks = tuple(host * 8 + i for host in range(4) for i in range(per_host))
        volume = ring("all_gather", len(ranks))[1] * size
        expected = volume / min(port * per_host, made.intra.bandwidth_bytes_per_s)
        assert collective_s(made, "all_gather", size, ranks, constants=PLAIN) == pytest.approx(expected)


def test_one_rank_per_host_shares_no_port_with_the_group_beside_it() -> None:
    """Eight groups of one rank per host run at once; each has its own port."""
    made = cluster(4)
    seconds = [collective_s(made, "all_reduce", 1e8, tuple(range(i, 32, 8))) for i in range(8)]
    assert len(set(seconds)) == 1 and seconds[0] >= 1.5 * 1e8 / made.inter.bandwidth_bytes_per_s


def test_a_tree_wins_where_hosts_are_many_and_messages_small() -> None:
    made = cluster(256)
    ranks = tuple(range(0, 2048, 8))
    small_s = collective_s(made, "all_reduce", 1e4, ranks, constants=PLAIN)
    assert small_s < 3 * math.log2(256) * made.inter.latency_s  # a ring would pay 510 steps
    # A gather has no tree.
    assert collective_s(made, "all_gather", 1e4, ranks, constants=PLAIN) > 10 * small_s
    # On large messages bandwidth decides, and the ring's is better.
    ring_s = 2 * 255 / 256 * 1e11 / made.inter.bandwidth_bytes_per_s
    large_s = collective_s(made, "all_reduce", 1e11, ranks, constants=PLAIN)
    assert ring_s <= large_s < 1.05 * ring_s


@pytest.mark.parametrize("kind", KINDS)
def test_protocols_never_make_a_larger_message_faster(kind: str) -> None:
    made = cluster(4)
    for ranks in (tuple(range(8)), tuple(range(32)), tuple(range(0, 32, 8))):
        seconds = [collective_s(made, kind, 10.0**e, ranks) for e in range(11)]
        assert seconds == sorted(seconds) and seconds[0] >= constants_of(made).collective_s


def test_oversubscription_slows_exchanges_across_leaves_and_not_rings() -> None:
    even = without_latency(cluster(16, hosts_per_switch=4))
    scarce = replace(even, oversubscription=4.0)
    inside, across = tuple(range(32)), tuple(range(128))
    for kind in KINDS:
        assert collective_s(scarce, kind, 1e9, inside) == collective_s(even, kind, 1e9, inside)
    # A ring has one edge out of a leaf of four hosts: a quarter of the ports is what it needs.
    assert collective_s(scarce, "all_reduce", 1e9, across) == collective_s(even, "all_reduce", 1e9, across)
    slower = collective_s(scarce, "all_to_all", 1e9, across) / collective_s(even, "all_to_all", 1e9, across)
    assert 2.5 < slower <= 4.0
    starved = replace(even, oversubscription=16.0)
    assert collective_s(starved, "all_reduce", 1e9, across) > 1.5 * collective_s(even, "all_reduce", 1e9, across)


def test_by_host_an_all_reduce_crosses_less() -> None:
    made = cluster(2)
    ranks = tuple(range(16))
    assert hierarchical_all_reduce_s(made, 1e9, tuple(range(8))) == collective_s(made, "all_reduce", 1e9, ranks[:8])
    flat_s, staged_s = collective_s(made, "all_reduce", 1e8, ranks), hierarchical_all_reduce_s(made, 1e8, ranks)
    assert 0.3 * flat_s < staged_s < 3 * flat_s
    with pytest.raises(ValueError, match="as many ranks"):
        hierarchical_all_reduce_s(made, 1e9, (0, 1, 2, 8))


def test_nonsense_topologies_are_refused() -> None:
    for change in ({"hosts_per_switch": -1}, {"oversubscription": 0.5}, {"oversubscription": 0.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            cluster(2, **change)


def test_measured_links_take_precedence() -> None:
    made = cluster(2)
    measured = replace(made, intra=replace(made.intra, collectives={"all_reduce": (1e-5, 1e9)}))
    assert collective_s(measured, "all_reduce", 1e9, tuple(range(8))) == pytest.approx(14 * 1e-5 + 1.75)
    assert collective_s(measured, "all_gather", 1e9, tuple(range(8))) == collective_s(
        made, "all_gather", 1e9, tuple(range(8))
    )
