"""The slots of a batch: which image has which, and what changes where free ones take the images that wait."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from decoding import decode, with_session
from fake_cuda import FakeBackend
from tolerances import SAME_TO_ROUNDING, largest_difference
from toy import DIM, IMAGE_CHAIN, TableDraws, ToyBackbone, toy_setup

from specdec_rt import DecodeOptions, Pipeline
from specdec_rt.backends.host import HostDevice
from specdec_rt.bundle import load_bundle
from specdec_rt.decode.batch import Batch
from specdec_rt.decode.session import Session
from specdec_rt.noise import NoiseSource, TokenNoise

TOKENS, IMAGES = 3, 7
DRAWS = TableDraws(0, 100, TOKENS)
KEYS = 10 * np.arange(IMAGES)
LABELS = np.array([3, 1, 4, 1, 5, 2, 6])


class InFours(HostDevice):
    """Batches come in multiples of four."""

    def batch_bucket(self, images):
        """As in `Device`."""
        return -(-images // 4) * 4


class RecordingBackbone(ToyBackbone):
    """Notes which images it was told of."""

    def __init__(self, device):
        super().__init__(device)
        self.begun, self.kept = [], []

    def begin(self, labels):
        """As in `Backbone`."""
        self.begun.append(labels.tolist())
        super().begin(labels)

    def keep(self, slots):
        """As in `Backbone`."""
        self.kept.append(slots.tolist())
        super().keep(slots)


def make_batch(slots, *, device=None, emit_mean=False):
    """A batch of seven images, and the backbone of its one model."""
    setup, device = toy_setup(TOKENS, mode="target"), device or HostDevice()
    backbone = RecordingBackbone(device)
    session = Session(device=device, target=replace(setup.target, backbone=backbone), draft=None)
    return Batch(session, replace(setup.plan, emit_mean=emit_mean), DRAWS, LABELS, KEYS, slots), backbone


def finish(batch, *slots):
    batch.ar_step[list(slots)] = TOKENS


# --- images come and go ----------------------------------------------------------------------------------


def test_the_first_images_are_admitted_in_order():
    batch, backbone = make_batch(3)
    assert (len(batch), batch.waiting) == (0, IMAGES)
    batch.admit()
    assert batch.image_of_slot.tolist() == [0, 1, 2]
    assert batch.ar_step.tolist() == [0, 0, 0]
    assert batch.under_way.all()
    assert batch.waiting == 4
    assert backbone.begun == [[3, 1, 4]]


def test_slots_beyond_the_images_have_no_work():
    batch, _ = make_batch(3, device=InFours())
    batch.admit()
    assert batch.under_way.tolist() == [True, True, True, False]
    assert batch.next_rows(1).positions.image_index.tolist() == [0, 1, 2]


def test_free_slots_are_given_to_images_that_wait():
    batch, backbone = make_batch(3)
    batch.admit()
    batch.ar_step[:] = 1
    batch.tokens[:] = 5
    finish(batch, 0, 2)
    batch.backfill()
    assert batch.image_of_slot.tolist() == [3, 1, 4]
    assert batch.ar_step.tolist() == [0, 1, 0]
    assert (batch.tokens[[0, 2]] == 0).all()
    assert (batch.tokens[1] == 5).all()
    assert batch.waiting == 2
    assert backbone.begun[1:] == [[1, 1, 5]]


def test_no_more_images_at_a_time_than_asked_for():
    batch, _ = make_batch(3, device=InFours())
    batch.admit()
    batch.backfill()
    assert batch.under_way.sum() == 3
    finish(batch, 1)
    batch.backfill()
    assert batch.image_of_slot[batch.under_way].tolist() == [0, 3, 2]
    finish(batch, 0, 1, 2)
    batch.backfill()
    assert sorted(batch.image_of_slot[batch.under_way]) == [4, 5, 6]
    assert batch.waiting == 0


def test_the_last_images_may_be_fewer_than_the_slots():
    batch, _ = make_batch(4)
    batch.admit()
    finish(batch, 0, 1, 2, 3)
    batch.admit()
    assert batch.image_of_slot.tolist() == [4, 5, 6]
    assert batch.waiting == 0


def test_slots_without_work_are_dropped():
    batch, backbone = make_batch(4)
    batch.admit()
    batch.tokens[:] = np.arange(4)[:, None, None]
    batch.ar_step[:] = [1, TOKENS, 2, TOKENS]
    batch.compact()
    assert batch.image_of_slot.tolist() == [0, 2]
    assert batch.ar_step.tolist() == [1, 2]
    assert batch.tokens[:, 0, 0].tolist() == [0, 2]
    assert backbone.kept == [[0, 2]]


def test_slots_without_work_stay_where_batches_come_in_sizes():
    batch, backbone = make_batch(7, device=InFours())
    batch.admit()
    finish(batch, 0, 1)
    batch.compact()  # five images: eight slots, as before
    assert len(batch) == 8
    assert backbone.kept == []
    finish(batch, 3, 5)
    batch.compact()  # three: four slots, one of them without work
    assert len(batch) == 4
    assert batch.image_of_slot[batch.under_way].tolist() == [2, 4, 6]
    assert backbone.kept == [[0, 2, 4, 6]]


def test_a_batch_that_is_done_keeps_its_slots():
    batch, backbone = make_batch(2)
    batch.admit()
    finish(batch, 0, 1)
    batch.compact()
    assert len(batch) == 2
    assert backbone.kept == []


# --- rows ------------------------------------------------------------------------------------------------


def test_rows_have_the_noise_of_their_images_keys_wherever_their_slots_are():
    batch, _ = make_batch(3)
    batch.admit()
    finish(batch, 0)
    batch.ar_step[1] = 1
    batch.backfill()
    rows = batch.next_rows(2)
    expected_keys = KEYS[np.array([3, 1, 2])[rows.positions.image_index]]
    noise = batch.noise(rows.positions)
    np.testing.assert_array_equal(noise.image, expected_keys)
    np.testing.assert_array_equal(noise.position, rows.positions.position)
    wanted = TokenNoise(DRAWS, expected_keys, rows.positions.position).chain(IMAGE_CHAIN.length, DIM)
    np.testing.assert_array_equal(rows.normals, wanted)
    assert rows.tokens is batch.tokens


@pytest.mark.parametrize("emit_mean", [False, True])
def test_tokens_are_fed_back_and_what_is_shown_is_kept_by_image(emit_mean):
    batch, _ = make_batch(2, emit_mean=emit_mean)
    batch.admit()
    finish(batch, 0)
    batch.backfill()  # image 2 is in slot 0
    positions = batch.next_rows(2).positions
    rows = np.array([0, 3])  # slot 0 at position 0, slot 1 at position 1
    token, mean = np.full((2, DIM), 7.0), np.full((2, DIM), 8.0)
    batch.store(positions, rows, token, mean)
    assert (batch.tokens[0, 0] == 7).all()
    assert (batch.tokens[1, 1] == 7).all()
    assert (batch.shown[[2, 1], [0, 1]] == (8 if emit_mean else 7)).all()
    assert np.count_nonzero(batch.shown) == 2 * DIM


# --- whole requests --------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class CountingSession(Session):
    """Notes how many images are under way, in how many slots, at each launch of a kind."""

    launched: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"draw": [], "speculate": []})

    def draw(self, model, inputs):
        """As in `Session`."""
        self._note("draw", inputs.positions)
        return super().draw(model, inputs)

    def speculate(self, inputs):
        """As in `Session`."""
        self._note("speculate", inputs.positions)
        return super().speculate(inputs)

    def _note(self, kind, positions):
        steps = len(positions.known) - 1
        self.launched[kind].append((int((positions.first_step < steps).sum()), len(positions.first_step)))


REQUEST, SLOTS = np.array([3, 1, 4, 1, 5]), 2


def request(pipeline, *, slots=SLOTS, batch_by_batch=False, **options):
    """Tokens, counters and launches of five images, in one request or in one for each batch."""
    few = {"ar_steps": 6} if pipeline.bundle.manifest.family == "mar" else {}
    asked = DecodeOptions(**{"guidance": 1.0, "draft_steps": 8, **few, **options})
    setup = with_session(pipeline.setup(asked), CountingSession)
    images = np.arange(len(REQUEST))
    parts = np.split(images, range(slots, len(images), slots)) if batch_by_batch else [images]
    made = [decode(setup, REQUEST[part], NoiseSource(3), images=part, slots=slots) for part in parts]
    return np.concatenate([each.tokens for each in made]), [each.counters for each in made], setup.session.launched


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"mode": "exact"}),
        ("digits-mar", {"mode": "exact"}),
        ("digits-mar", {"mode": "paper", "prefill": 0.0, "draft_length": 2}),
    ],
)
def test_backfilled_images_are_those_of_requests_of_their_own_in_fewer_rounds(cpu, name, options):
    expected, counters, apart = request(cpu(name), batch_by_batch=True, **options)
    found, (together,), launched = request(cpu(name), **options)
    assert largest_difference(found, expected) <= SAME_TO_ROUNDING
    for counted in ("rounds", "accepted", "drafted", "target_backbone_calls", "sequential_head_calls"):
        assert getattr(together, counted) == sum(getattr(each, counted) for each in counters)
    assert len(launched["speculate"]) < len(apart["speculate"])
    assert max(slots for _, slots in launched["speculate"]) == SLOTS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", {"mode": "draft"}),
        ("digits-mar", {"mode": "target"}),
        ("digits-mar", {"mode": "exact", "prefill": 0.3}),
    ],
)
def test_images_that_keep_step_are_admitted_batch_by_batch(cpu, name, options):
    expected, _, apart = request(cpu(name), batch_by_batch=True, **options)
    found, _, launched = request(cpu(name), **options)
    np.testing.assert_array_equal(found, expected)
    assert launched == apart


def test_progress_grows_to_all_tokens(cpu):
    seen = []
    asked = {"mode": "exact", "guidance": 1.0, "batch_size": SLOTS, "progress": lambda *told: seen.append(told)}
    cpu("digits").generate(REQUEST, **asked)
    assert seen[-1] == (len(REQUEST) * 49,) * 2
    assert all(first < second for (first, _), (second, _) in pairwise(seen))


def test_padded_slots_stay_free_on_a_device_with_batch_sizes(make_gpu):
    """Three of four slots are for images, whichever end first; the last image has a slot alone."""
    _, device = make_gpu(batch_buckets=(1, 4))
    _, _, launched = request(Pipeline(load_bundle("digits-mar"), FakeBackend(device)), slots=3, mode="exact")
    rounds = launched["speculate"]
    assert rounds[0] == (3, 4)
    assert max(images for images, _ in rounds) == 3
    assert {slots for _, slots in rounds} == {1, 4}
