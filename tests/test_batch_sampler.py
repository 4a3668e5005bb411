"""Order: every image once an epoch, one bucket a round, the same for two processes as for twice the accumulation."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.batch_sampler import BatchSampler, BucketGroup

groups = st.lists(st.tuples(st.integers(1, 23), st.integers(1, 5)), min_size=1, max_size=5)


def make_order(shape, **settings) -> BatchSampler:
    numbered, start = [], 0
    for count, batch_size in shape:
        numbered.append(BucketGroup(tuple(range(start, start + count)), batch_size))
        start += count
    return BatchSampler(tuple(numbered), 1, **settings)


@given(shape=groups, world_size=st.integers(1, 3), accumulation_steps=st.integers(1, 3))
def test_an_epoch_holds_every_image_once_and_steps_are_of_one_bucket(
    shape, world_size, accumulation_steps
):
    order = make_order(shape, world_size=world_size, accumulation_steps=accumulation_steps)
    rounds = order.epoch(0)
    assert len(rounds) == order.steps_per_epoch
    seen = Counter(sample for members in rounds for batch in members for sample in batch)
    assert seen == Counter(range(sum(count for count, _ in shape)))
    owner = {sample: i for i, group in enumerate(order.groups) for sample in group.samples}
    mixed = 0
    for members in rounds:
        for batch in members:
            assert len({owner[sample] for sample in batch}) == 1
        mixed += (
            len({owner[batch[0]] for batch in members}) > 1 or len(members) < order.batches_per_step
        )
    # Only left-over micro-batches are mixed: fewer than a round's worth from each group.
    assert mixed <= -(-len(shape) * (order.batches_per_step - 1) // order.batches_per_step)


@given(shape=groups, world_size=st.integers(2, 3))
def test_processes_see_together_what_one_with_accumulation_sees(shape, world_size):
    alone = make_order(shape, accumulation_steps=world_size)
    together = make_order(shape, world_size=world_size)
    assert alone.steps_per_epoch == together.steps_per_epoch
    steps = 2 * alone.steps_per_epoch
    by_step: dict[int, list] = {}
    for micro in alone.from_step(0, 0):
        if micro.position.step >= steps:
            break
        by_step.setdefault(micro.position.step, []).append(
            (micro.position.microbatch_index, micro.position.first_sample_index, micro.samples)
        )
    shares: dict[int, list] = {}
    for rank in range(world_size):
        for micro in islice(together.from_step(0, rank), steps):
            assert micro.position.is_last_microbatch
            if not micro.position.is_padding:
                shares.setdefault(micro.position.step, []).append(
                    (
                        micro.position.microbatch_index,
                        micro.position.first_sample_index,
                        micro.samples,
                    )
                )
    assert {step: sorted(parts) for step, parts in shares.items()} == {
        step: sorted(parts) for step, parts in by_step.items()
    }


@given(shape=groups, start=st.integers(0, 40), accumulation_steps=st.integers(1, 3))
def test_starting_at_a_step_gives_the_same_order_as_running_from_the_first(
    shape, start, accumulation_steps
):
    order = make_order(shape, accumulation_steps=accumulation_steps)
    whole = [micro for micro in islice(order.from_step(0, 0), 400) if micro.position.step >= start]
    assert list(islice(order.from_step(start, 0), len(whole))) == whole


def test_windows_end_with_the_epoch_and_count_their_images():
    order = make_order(
        [(5, 2)], accumulation_steps=2
    )  # batches of 2, 2, 1 -> windows of 2 + 2 and of 1, in some order
    places = [micro.position for micro in islice(order.from_step(0, 0), 3)]
    assert sorted({place.step: place.global_batch_size for place in places}.values()) in (
        [1, 4],
        [2, 3],
    )
    assert [place.is_last_microbatch for place in places].count(True) == 2
    assert {place.first_sample_index for place in places} == {
        0,
        *(place.first_sample_index for place in places),
    } and max(place.first_sample_index for place in places) < 5


def test_a_process_without_work_computes_an_idle_batch():
    order = make_order([(3, 1)], world_size=2)
    idle = [micro.position.is_padding for micro in islice(order.from_step(0, 1), 2)]
    assert sorted(idle) == [False, True]


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 1}])
def test_seed_and_epoch_change_the_order(change):
    order = make_order([(50, 2)])
    other = BatchSampler(order.groups, change.get("seed", 1))
    assert order.epoch(0) == order.epoch(0)
    assert order.epoch(0) != other.epoch(change.get("epoch", 0))
