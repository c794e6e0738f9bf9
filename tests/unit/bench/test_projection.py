"""A rank without peers does and sends what it does in a gang, and links are replayed as they are stated."""

import argparse
import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench.exchange import SETTLING, unet_inputs
from bench.projection.__main__ import COLUMNS, tabulate
from bench.projection.links import Link, exposed_s, parse_link
from bench.projection.peers import Moment, NotedPeers, Step
from bench.projection.rounds import Round, cases, measure, places, slowest
from bench.projection.share import Share, measure_share
from bench.published import PUBLISHED, random_network
from bench.report import Report
from distriray import ParallelConfig, parallelize
from distriray.collective import connect, run_in_lockstep
from distriray.config import MIXES
from distriray.parallel import engine_of
from distriray.parallel.kernels import plain
from distriray.parallel.layout import GangLayout
from tests.models import tiny_sdxl_unet
from tests.parameters import sweep

SIZE = 256
FAST = Link("fast", 0.0, 1e15)


def step(*moments, seconds=1.0):
    return Step(seconds, list(moments))


def launch(transfer, at_s, nbytes):
    return Moment("launch", transfer, at_s, {1: nbytes})


def wait(transfer, at_s):
    return Moment("wait", transfer, at_s)


def config(exchange="displaced", split=False):
    return ParallelConfig(exchange=exchange, warmup_steps=1, cfg_parallel=split)


@pytest.mark.parametrize(
    ("ranks", "split", "exchange"),
    sweep(
        [
            (2, False, "sync"),
            *((2, False, mix) for mix in MIXES if mix != "sync"),
            (2, True, "sync"),
            (4, False, "displaced"),
            (4, True, "sync"),
        ]
    ),
)
def test_a_rank_alone_sends_what_it_sends_in_a_gang(ranks, split, exchange):
    def last_step(communicator):
        unet = tiny_sdxl_unet()
        parallelize(unet, communicator, config(exchange, split))
        inputs = unet_inputs(unet, SIZE)
        with engine_of(unet).image():
            for at in range(3):
                unet(timestep=900 - at, **inputs)
        return engine_of(unet).statistics

    taken = run_in_lockstep(ranks, last_step)
    for rank in places(ranks):
        share = measure_share(tiny_sdxl_unet(), rank, ranks, SIZE, 1, config(exchange, split))
        step = share.later[-1]
        assert sum(step.sent.values()) == taken[rank].bytes_sent
        waits = [moment.transfer for moment in step.moments if moment.kind == "wait"]
        launches = [moment.transfer for moment in step.moments if moment.kind == "launch"]
        assert len(launches) == len(waits) >= taken[rank].waits
        if exchange == "sync":
            assert waits == launches, "what is fresh is waited for in the step that sends it"


@pytest.mark.parametrize("exchange", MIXES)
def test_a_rank_alone_computes_with_values_and_no_garbage(exchange):
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output)

    unet = parallelize(tiny_sdxl_unet(), connect("local"), local=[keep])
    unet.conv_out.register_forward_hook(keep)
    measure_share(unet, 1, 4, SIZE, 2, config(exchange))
    assert len(outputs) == SETTLING + 2
    assert all(output.isfinite().all() and output.abs().max() < 1e3 for output in outputs)


def test_neighbours_are_sent_halos_too_and_the_one_below_those_of_the_downsamplings():
    share = measure_share(tiny_sdxl_unet(), 2, 4, SIZE, 1, config())
    sent = share.later[-1].sent
    assert sent.keys() == {0, 1, 3}
    assert sent[3] > sent[1] > sent[0] > 0


@pytest.mark.parametrize("ranks", [3, 6, 8])
def test_a_rank_with_a_neighbour_on_each_side_is_measured_where_one_has(ranks, monkeypatch):
    measured = []

    def note(unet, rank, world_size, size, steps, config):
        measured.append((GangLayout.of(world_size, 2, config.cfg_parallel), rank))
        return Share(step(), [step(), step()])

    monkeypatch.setattr("bench.projection.rounds.measure_share", note)
    monkeypatch.setattr("bench.projection.rounds.random_network", lambda *options: None)
    arguments = argparse.Namespace(
        model="sdxl", dtype="float32", sizes=[SIZE], ranks=[ranks], exchange=["sync"], rounds=1, steps=1
    )
    measure(connect("local"), arguments)
    for halves in {layout.halves for layout, _ in measured}:
        found = {(layout.patch(rank), layout.patches) for layout, rank in measured if layout.halves == halves}
        assert any(patch == 0 for patch, _ in found)
        assert any(0 < patch < patches - 1 for patch, patches in found)


def test_two_ranks_with_a_branch_each_are_measured_at_a_time():
    (split, together) = cases([SIZE], [2], ["sync"])
    assert [places(case.patches, case.halves) for case in (split, together)] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_that_are_timed_do_all_that_later_ones_do(steps, monkeypatch):
    fits = []
    extrapolate = plain.Fit.extrapolate
    monkeypatch.setattr(plain.Fit, "extrapolate", lambda *given: (fits.append(1), extrapolate(*given)))
    for count in (steps, steps + 1):
        measure_share(tiny_sdxl_unet(), 1, 2, SIZE, count, config())
        fits.append(-1)
    fewer, more = (len(list(fitted)) for of_step, fitted in itertools.groupby(fits) if of_step == 1)
    assert fewer == steps * (more - fewer) > 0


def test_with_split_guidance_two_ranks_swap_only_the_noise():
    sent = measure_share(tiny_sdxl_unet(), 0, 2, SIZE, 1, config(split=True)).later[-1].sent
    noise = 4 * (SIZE // 8) ** 2 * 4
    assert noise <= sent[1] <= noise + 64


def test_a_transfer_that_ends_before_it_is_awaited_costs_nothing():
    steps = [step(launch(1, 0.5, 1000)), step(wait(1, 0.4))]
    assert exposed_s(steps, Link("l", 0.1, 1e4)) == [0.0, 0.0]


def test_a_transfer_that_is_awaited_too_early_costs_the_rest():
    steps = [step(launch(1, 0.5, 1000)), step(wait(1, 0.4))]
    assert exposed_s(steps, Link("l", 0.0, 1e3)) == pytest.approx([0.0, 0.1])


def test_transfers_queue_for_the_link():
    steps = [step(launch(1, 0.0, 1000), launch(2, 0.0, 1000), wait(2, 1.0))]
    assert exposed_s(steps, Link("l", 0.0, 1e3)) == pytest.approx([1.0])


def test_what_waits_later_profits_from_an_earlier_delay():
    steps = [step(launch(1, 0.0, 1000), launch(2, 0.0, 1000), wait(1, 0.5), wait(2, 1.0))]
    assert exposed_s(steps, Link("l", 0.0, 1e3)) == pytest.approx([1.0])


def test_bytes_that_the_processor_moves_are_never_hidden():
    steps = [step(launch(1, 0.0, 1000)), step(wait(1, 0.9))]
    assert exposed_s(steps, Link("l", 0.5, 1e4, hides=False)) == pytest.approx([0.6, 0.0])


def test_synchronous_steps_of_an_image_wait_for_every_transfer():
    share = Share(step(launch(1, 0.0, 100), launch(2, 0.5, 100)), [step(), step()])
    link = Link("l", 0.5, 1e3)
    assert share.image(link, 10, 4) == pytest.approx(4 * (1.0 + 2 * 0.6) + 6 * 1.0)


def test_what_filling_takes_is_no_time_of_the_rank(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("bench.projection.peers.mark", lambda device: float(next(clock)))
    peers = NotedPeers(0, 2, torch.device("cpu"))
    peers.begin_step()  # 0
    for _ in range(2):
        peers.exchange({1: torch.ones(4)}, {1: torch.empty(4)}).wait()  # filled in one second, 1 to 2, 5 to 6
    taken = peers.end_step()  # 9
    assert [(moment.kind, moment.at_s) for moment in taken.moments] == [
        ("launch", 2), ("wait", 3), ("launch", 5), ("wait", 6),
    ]  # fmt: skip
    assert taken.seconds == 7


def test_links_are_stated_with_latency_and_bandwidth():
    assert parse_link("pcie4:20:25") == Link("pcie4", 20e-6, 25e9)


@pytest.mark.parametrize("text", ["pcie4", "pcie4:20", "pcie4:fast:25", "pcie4:20:0", "pcie4:-1:25"])
def test_what_is_no_link_is_refused(text):
    with pytest.raises(ValueError, match=text):
        parse_link(text)


def test_random_weights_have_the_dtype_and_follow_the_seed():
    config, device = dict(tiny_sdxl_unet().config), torch.device("cpu")
    one, same, other = (
        random_network(lambda: UNet2DConditionModel(**config), device, torch.bfloat16, seed)
        for seed in (0, 0, 1)
    )
    assert one.dtype == torch.bfloat16 and torch.get_default_dtype() == torch.float32
    assert torch.equal(one.conv_in.weight, same.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


def test_a_gang_is_as_slow_as_its_slowest_rank():
    (case,) = cases([SIZE], [1], ["displaced", "sync"])
    quick, slow = (Share(step(), [step(), step(seconds=s)]) for s in (1.0, 2.0))
    assert slowest((Round({case: quick}, {case: 1.0}), Round({case: slow}, {case: 3.0}))) == Round(
        {case: slow}, {case: 3.0}
    )


def test_one_device_tells_all_gangs_and_every_number_of_theirs_is_called_projected(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "sdxl", replace(PUBLISHED["sdxl"], make=tiny_sdxl_unet))
    links = [FAST, Link("slow", 1e-3, 1e6)]
    arguments = argparse.Namespace(
        model="sdxl", dtype="float32", sizes=[SIZE], ranks=[1, 2, 4, 8], rounds=1, steps=2, links=links
    )
    arguments.image_steps, arguments.warmup_steps, arguments.exchange = 50, None, ["displaced", "sync"]
    rounds = measure(connect("local"), arguments)
    report = Report("t", COLUMNS, seed=0, settings={})
    tabulate(report, rounds, arguments)
    # one rank; two with guidance split, who exchange nothing; then 2, 4, 4, 8 and 8 in two modes
    assert len(report.rows) == 1 + 2 * (1 + 2 * 5)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in report.rows]
    assert {row["measured step, s"] for row in rows} == {"-"}
    for fast, slow in zip(rows[1::2], rows[2::2], strict=True):
        assert float(fast["projected exposed, s"]) < float(slow["projected exposed, s"])
        assert float(fast["projected step, s"]) < float(slow["projected step, s"])
