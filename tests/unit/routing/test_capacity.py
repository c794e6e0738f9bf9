"""Which gangs fit on a host whose dead workers break blocks."""

from hypothesis import given
from hypothesis import strategies as st

from distriray.routing.buddy import BuddyAllocator
from distriray.routing.capacity import Capacity
from distriray.routing.policy import HostView


@st.composite
def hosts(draw):
    sizes = draw(st.sampled_from([(1,), (2,), (1, 2, 4, 8), (1, 3, 6), (2, 8)]))
    return HostView(0.0, tuple(sorted(draw(st.sets(st.integers(0, 15))))), sizes, ())


def packs(host, gangs):
    blocks = BuddyAllocator(host.workers, host.gang_sizes)
    return all(blocks.lease(size) for size in sorted(gangs, reverse=True))


def test_only_blocks_without_a_dead_worker_count():
    assert Capacity.of(HostView(0.0, (1, 3, 5, 6, 7), (1, 2, 4), ())) == Capacity({1: 5, 2: 2, 4: 0})


@given(host=hosts(), data=st.data())
def test_gangs_fit_exactly_when_they_can_be_packed(host, data):
    capacity = Capacity.of(host)
    gangs = []
    for size in data.draw(st.lists(st.sampled_from(host.gang_sizes), max_size=8)):
        assert capacity.fits(size) == packs(host, [*gangs, size])
        assert capacity.fits(size) == (size <= capacity.largest)
        if capacity.fits(size):
            capacity.take(size)
            gangs.append(size)


@given(host=hosts(), data=st.data())
def test_a_gang_grows_exactly_when_the_larger_one_can_be_packed(host, data):
    capacity = Capacity.of(host)
    gangs = []
    for size in data.draw(st.lists(st.sampled_from(host.gang_sizes), max_size=8)):
        if capacity.fits(size):
            capacity.take(size)
            gangs.append(size)
    for at, size in enumerate(gangs):
        larger = data.draw(st.sampled_from([s for s in host.gang_sizes if s >= size]))
        others = gangs[:at] + gangs[at + 1 :]
        assert capacity.fits(larger, size) == packs(host, [*others, larger])
        if capacity.fits(larger, size):
            capacity.take(larger, size)
            gangs[at] = larger
