"""The latency model: what was measured, what lies between, and what is seen later."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distriray.routing.host_clock import HostClock
from distriray.routing.latency import MAX_OBSERVED, LatencyModel
from distriray.routing.profile import Entry, Profile


def entry(gang, side, step_s, batch=1, **more):
    return Entry(gang=gang, height=side, width=side, batch=batch, step_s=step_s, **more)


def profile(*entries, **more):
    return Profile(model="m", device="d", version="1", entries=entries, **more)


FOUR = profile(entry(1, 512, 0.1), entry(1, 1024, 0.4), entry(4, 512, 0.05), entry(4, 1024, 0.1))


def test_measured_cases_are_answered_as_measured():
    model = LatencyModel(FOUR)
    assert [model.step_s(g, s, s, 1) for g in (1, 4) for s in (512, 1024)] == [0.1, 0.4, 0.05, 0.1]


def test_between_measured_sizes_times_follow_the_power_law():
    model = LatencyModel(FOUR)
    assert model.step_s(1, 512, 1024, 1) == pytest.approx(0.2)
    assert model.step_s(2, 1024, 1024, 1) == pytest.approx(0.2)


def test_beyond_the_profile_the_last_slope_goes_on_but_no_gang_is_superlinear():
    model = LatencyModel(FOUR)
    assert model.step_s(1, 2048, 2048, 1) == pytest.approx(1.6)
    assert model.step_s(8, 1024, 1024, 1) >= 0.1 / 2
    assert model.step_s(1, 1024, 1024, 4) == pytest.approx(4 * 0.4)


@given(st.integers(1, 16), st.integers(64, 4096), st.integers(64, 4096), st.integers(1, 16))
def test_every_case_has_a_positive_time_and_no_time_falls_with_the_size(gang, height, width, batch):
    model = LatencyModel(FOUR)
    assert (
        0 < model.step_s(gang, height, width, batch) <= model.step_s(gang, height + 64, width, batch) * 1.0001
    )
    assert model.step_s(gang, height, width, batch) <= model.step_s(gang, height, width, batch + 1) * 1.0001


def test_it_is_less_sure_the_further_a_case_is_from_any_measured_one():
    model = LatencyModel(FOUR)
    errors = [model.times(1, side, side, 1).error for side in (1024, 1448, 2048, 4096)]
    assert errors == sorted(errors) and errors[0] < errors[1] < errors[-1]


def test_a_third_of_wild_outliers_hardly_moves_it():
    model, draw = LatencyModel(FOUR), random.Random(0)
    for i in range(60):
        model.observe(1, 512, 512, 1, (5.0 if i % 3 == 0 else 0.12) * draw.uniform(0.99, 1.01))
    assert model.step_s(1, 512, 512, 1) == pytest.approx(0.12, rel=0.06)


def test_a_lasting_change_is_believed():
    model = LatencyModel(FOUR)
    for _ in range(15):
        model.observe(1, 512, 512, 1, 0.1)
    for _ in range(15):
        model.observe(1, 512, 512, 1, 0.2)
    assert model.step_s(1, 512, 512, 1) == pytest.approx(0.2, rel=0.02)


def test_what_is_observed_of_one_case_corrects_the_others_until_they_are_observed():
    model = LatencyModel(FOUR)
    for _ in range(20):
        model.observe(1, 512, 512, 1, 0.13)
    assert model.step_s(4, 1024, 1024, 1) == pytest.approx(0.13, rel=0.01)
    for _ in range(12):
        model.observe(4, 1024, 1024, 1, 0.1)
    assert model.step_s(4, 1024, 1024, 1) == pytest.approx(0.1, rel=0.05)


def test_observing_makes_it_surer():
    model = LatencyModel(FOUR)
    before = model.times(2, 768, 768, 1).error
    for _ in range(5):
        model.observe(2, 768, 768, 1, 0.15)
    assert model.times(2, 768, 768, 1).error < before


def test_run_counts_prepare_warmup_and_decode():
    model = LatencyModel(
        profile(
            entry(2, 512, 0.1, sync_step_s=0.3, prepare_s=1.0, decode_s=0.5), regroup_s=0.05, warmup_steps=2
        )
    )
    times = model.times(2, 512, 512, 1)
    assert times.run_s(0, 10, prepared=True) == pytest.approx(2 * 0.3 + 8 * 0.1 + 0.5)
    assert times.run_s(0, 10) == pytest.approx(1.0 + 2 * 0.3 + 8 * 0.1 + 0.5)
    assert times.run_s(5, 10) == pytest.approx(5 * 0.1 + 0.5)
    assert times.run_s(5, 10, warmup_steps=7) == pytest.approx(2 * 0.3 + 3 * 0.1 + 0.5)
    assert times.regroup_s == pytest.approx(0.05 + 0.2)


def test_a_profile_comes_back_from_disk_as_it_was(tmp_path):
    path = Profile.path(tmp_path, "builtin:landscapes", "NVIDIA H200", "0.1.0")
    FOUR.save(path)
    assert Profile.load(path) == FOUR
    assert [p.name for p in tmp_path.iterdir()] == ["builtin-landscapes--NVIDIA-H200--0.1.0.json"]


def test_a_profile_whose_name_is_too_long_for_a_file_has_one_of_its_own(tmp_path):
    models = [f"/{'deep/' * 60}{name}" for name in ("a", "b")]
    paths = {Profile.path(tmp_path, model, "NVIDIA H200", "0.1.0") for model in models}
    assert len(paths) == 2
    for path in paths:
        FOUR.save(path)
        assert Profile.load(path) == FOUR


def test_a_profile_with_an_impossible_time_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(FOUR.model_dump_json().replace("0.05", "-0.05"))
    with pytest.raises(ValidationError, match="step_s"):
        Profile.load(path)


def test_few_busy_workers_are_faster_where_they_share_cores_and_not_elsewhere():
    crowded = LatencyModel(profile(entry(1, 512, 0.1), contention=((1, 0.5), (4, 1.0))))
    assert [crowded.pace(busy) for busy in (1, 2, 4, 8)] == pytest.approx([0.5, 0.5**0.5, 1.0, 1.0])
    assert [LatencyModel(FOUR).pace(busy) for busy in (1, 8)] == [1.0, 1.0]


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.1, 2.0)), max_size=8), st.floats(0.0, 5.0))
def test_a_hosts_own_time_runs_through_changes_of_pace_and_back(changes, later):
    time, now, own = HostClock(), 0.0, 0.0
    for after, pace in changes:
        own += after / time.pace
        now += after
        time.change(pace, now)
    assert time.at(now) == pytest.approx(own)
    assert time.when(time.at(now + later)) == pytest.approx(now + later)


def test_a_case_that_is_seen_again_and_again_is_known_among_thousands_that_are_not():
    model = LatencyModel(FOUR)
    for i in range(5000):
        model.observe(1, 64 + 8 * (i % 71), 64 + 8 * (i // 71), 1, 0.01)
        if i % (MAX_OBSERVED // 2) == 0:
            model.observe(1, 1024, 1024, 1, 0.8)
    assert model.step_s(1, 1024, 1024, 1) > 0.4


def test_a_step_without_guidance_is_half_a_step_with_it():
    model = LatencyModel(profile(entry(1, 512, 0.2, sync_step_s=0.3, prepare_s=0.1, decode_s=0.4)))
    guided, plain = model.times(1, 512, 512, 1), model.times(1, 512, 512, 1, False)
    assert plain.step_s == pytest.approx(guided.step_s / 2) and plain.sync_step_s == pytest.approx(0.15)
    assert (plain.prepare_s, plain.decode_s) == pytest.approx((guided.prepare_s, guided.decode_s))
    assert plain.error > guided.error, "nobody has measured it"
    assert model.step_s(1, 512, 512, 2, False) == pytest.approx(guided.step_s), "as much for the network"
    assert plain.run_s(0, 10) == pytest.approx(0.1 + 9 * 0.1 + 0.15 + 0.4)


def test_a_step_that_was_measured_is_not_taken_for_another_of_as_many_branches():
    pair = entry(1, 512, 0.9, batch=2, guided=False), entry(1, 512, 0.2)
    for entries in (pair, pair[::-1]):
        model = LatencyModel(profile(*entries))
        assert (model.step_s(1, 512, 512, 1), model.step_s(1, 512, 512, 2, False)) == (0.2, 0.9)
        assert model.step_s(1, 256, 512, 1) == pytest.approx(0.1), "nor what is interpolated from it"


def test_a_picture_of_synchronous_steps_takes_their_time_and_teaches_what_the_others_take():
    model = LatencyModel(profile(entry(2, 512, 0.2, sync_step_s=0.3), regroup_s=0.05, warmup_steps=4))
    displaced, fresh = model.times(2, 512, 512, 1), model.times(2, 512, 512, 1, fresh=True)
    assert displaced.run_s(0, 10) == pytest.approx(4 * 0.3 + 6 * 0.2)
    assert fresh.run_s(0, 10) == pytest.approx(10 * 0.3)
    assert displaced.regroup_s == pytest.approx(0.15) and fresh.regroup_s == pytest.approx(0.05)
    for _ in range(20):
        model.observe(2, 512, 512, 1, 0.1)
    assert model.times(2, 512, 512, 1, fresh=True).step_s == pytest.approx(0.15, rel=0.1)


def test_what_was_measured_without_guidance_is_answered_as_measured():
    model = LatencyModel(profile(entry(1, 512, 0.2), entry(1, 512, 0.15, guided=False)))
    assert [model.step_s(1, 512, 512, 1, guided) for guided in (True, False)] == [0.2, 0.15]
    lone = LatencyModel(profile(entry(1, 512, 0.2, guided=False)))
    assert lone.step_s(1, 512, 512, 1) == pytest.approx(0.4)


def test_guided_and_unguided_segments_teach_each_their_own_case():
    model = LatencyModel(profile(entry(1, 512, 0.2)))
    for _ in range(20):
        model.observe(1, 512, 512, 1, 0.2)
        model.observe(1, 512, 512, 1, 0.16, guided=False)
    assert model.step_s(1, 512, 512, 1) == pytest.approx(0.2, rel=0.1)
    assert model.step_s(1, 512, 512, 1, False) == pytest.approx(0.16, rel=0.1)


def test_what_a_step_computes_besides_is_guessed_then_learnt_and_spoils_nothing_else():
    model = LatencyModel(profile(entry(1, 512, 0.2, prepare_s=0.1, decode_s=0.4)))
    edges, ink = (("control edges 0 1", 0.3),), (("lora ink", 0.3),)
    plain, guessed = model.times(1, 512, 512, 1), model.times(1, 512, 512, 1, besides=edges)
    assert guessed.step_s == pytest.approx(0.26) and guessed.error > plain.error
    for _ in range(20):
        model.observe(1, 512, 512, 1, 0.3, besides=edges)
    learnt = model.times(1, 512, 512, 1, besides=edges)
    assert learnt.step_s == pytest.approx(0.3, rel=0.05) and learnt.error < guessed.error
    assert (learnt.prepare_s, learnt.decode_s) == pytest.approx((0.1, 0.4)), "not what steps compute"
    assert model.times(1, 512, 512, 1) == plain
    assert model.times(1, 512, 512, 1, besides=ink).step_s == pytest.approx(0.26)
    for _ in range(20):
        model.observe(1, 512, 512, 1, 0.4)
    assert model.times(1, 512, 512, 1, besides=ink).step_s == pytest.approx(0.52, rel=0.1), "all got slower"


def test_profiles_from_before_guidance_was_part_of_a_case_are_of_guided_steps(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(
        '{"model":"m","device":"d","version":"1","entries":[{"gang":1,"height":8,"width":8,"step_s":1}]}'
    )
    assert Profile.load(path).entries[0].guided


def test_a_guess_is_no_knowledge_until_three_segments_were_observed():
    model = LatencyModel(FOUR.model_copy(update={"guessed": True}))
    for _ in range(3):
        assert not model.knows
        model.observe(1, 512, 512, 1, 0.01)
    assert model.knows and LatencyModel(FOUR).knows


def test_a_guess_learns_of_steps_with_something_besides_until_it_has_seen_some_without():
    model, edges = LatencyModel(FOUR.model_copy(update={"guessed": True})), (("references 262144", 1.0),)
    for _ in range(3):
        assert not model.knows
        model.observe(1, 512, 512, 1, 20.0, besides=edges)  # a hundred times what was guessed
    assert model.knows
    assert model.step_s(1, 512, 512, 1) == pytest.approx(10.0)
    assert model.step_s(4, 1024, 1024, 1) == pytest.approx(10.0), "the others too"
    for _ in range(3):
        model.observe(1, 1024, 1024, 1, 0.8)
    assert model.step_s(4, 1024, 1024, 1) == pytest.approx(0.2), "plain steps count where there are enough"


def test_what_comes_before_and_behind_the_steps_is_observed_too():
    model = LatencyModel(profile(entry(1, 512, 0.2, prepare_s=0.1, decode_s=0.4), entry(2, 512, 0.1)))
    guessed = model.times(1, 512, 512, 1)
    for _ in range(20):
        model.observe(1, 512, 512, 1, 0.2, prepare_s=0.3, decode_s=1.6)
    learnt = model.times(1, 512, 512, 1)
    assert learnt.step_s == pytest.approx(guessed.step_s)
    assert (learnt.prepare_s, learnt.decode_s) == pytest.approx((0.3, 1.6))
    assert model.times(1, 512, 512, 1, guided=False).decode_s == pytest.approx(1.6), (
        "with or without guidance"
    )
    assert model.times(1, 512, 1024, 1).decode_s == pytest.approx(3.2), "of others by what these were"
    unknown = model.times(2, 512, 512, 1)
    assert (unknown.prepare_s, unknown.decode_s) == pytest.approx((0.3, 1.6)), "what its profile lacks"
    for _ in range(20):
        model.observe(2, 512, 512, 1, prepare_s=0.25, decode_s=0.9)
    learnt = model.times(2, 512, 512, 1)
    assert (learnt.prepare_s, learnt.decode_s) == pytest.approx((0.25, 0.9))
    assert learnt.step_s == pytest.approx(0.1), "nothing was said of steps"


def test_until_it_is_observed_what_is_not_a_step_is_slower_as_steps_are():
    model = LatencyModel(profile(entry(1, 512, 0.2, prepare_s=0.1, decode_s=0.4)))
    for _ in range(20):
        model.observe(1, 512, 512, 1, 0.4)
    times = model.times(1, 512, 512, 1)
    assert (times.prepare_s, times.decode_s) == pytest.approx((0.2, 0.8), rel=0.01)
    for _ in range(3):
        model.observe(1, 512, 512, 1, 0.4, decode_s=0.4)
    assert model.times(1, 512, 512, 1).decode_s == pytest.approx(0.4)
    assert model.times(1, 512, 512, 1).prepare_s == times.prepare_s


def test_what_is_prepared_beside_references_teaches_nothing_else():
    model = LatencyModel(profile(entry(1, 512, 0.2, prepare_s=0.1, decode_s=0.4)))
    plain, edits = model.times(1, 512, 512, 1), (("references 262144", 1.0),)
    for _ in range(20):
        model.observe(1, 512, 512, 1, besides=edits, prepare_s=2.0, decode_s=0.4)
    assert model.times(1, 512, 512, 1, besides=edits).prepare_s == pytest.approx(2.0)
    assert model.times(1, 512, 512, 1) == plain


def test_cases_of_a_profile_count_in_any_order():
    ahead, behind = (LatencyModel(profile(*entries)) for entries in (FOUR.entries, FOUR.entries[::-1]))
    cases = [
        (gang, side, side, batch) for gang in (1, 2, 3, 8) for side in (256, 700, 2048) for batch in (1, 3)
    ]
    assert [ahead.step_s(*case) for case in cases] == pytest.approx([behind.step_s(*case) for case in cases])


def test_a_batch_that_nobody_measured_costs_at_most_its_size():
    model = LatencyModel(profile(entry(1, 512, 0.1), entry(1, 512, 0.4, batch=2)))
    assert model.step_s(1, 512, 512, 8) == pytest.approx(4 * 0.4), "though two cost four times as much as one"
