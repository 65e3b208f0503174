"""Counter-based noise: what a draw depends on, what it does not, and how it is distributed."""

import itertools

import numpy as np
import pytest
from scipy import stats

from specdec_rt import noise
from specdec_rt.errors import UsageError
from specdec_rt.noise import NoiseSource, Purpose, TokenNoise

IMAGE, TOKEN = np.array([0, 0, 5, 1]), np.array([0, 1, 2, 0])


def philox(key, counter):
    """Four words of Philox4x64-10 (Salmon et al., SC 2011), written out in plain integers."""
    mask, (key_0, key_1), (c_0, c_1, c_2, c_3) = 2**64 - 1, key, counter
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c_0, 0xCA5A826395121157 * c_2
        c_0, c_1, c_2, c_3 = (high >> 64) ^ c_1 ^ key_0, high & mask, (low >> 64) ^ c_3 ^ key_1, low & mask
        key_0, key_1 = (key_0 + 0x9E3779B97F4A7C15) & mask, (key_1 + 0xBB67AE8584CAA73B) & mask
    return [c_0, c_1, c_2, c_3]


def test_the_streams_place_is_position_token_image_kind():
    """Counter words in this order, the position counted from 1, and a uniform is the centre of one of 2**52 cells."""
    drawn = NoiseSource(11).uniform(np.array([9]), np.array([4]), Purpose.ORDER, 8)
    words = [word for position in (1, 2) for word in philox((11, 4), (position, 4, 9, 1))]
    np.testing.assert_array_equal(drawn[0], [((word >> 12) + 0.5) / 2**52 for word in words])


def test_known_answers():
    """Frozen: a change here changes every image of every seed."""
    source, image, token = NoiseSource(2**64 - 1), np.array([3]), np.array([7])
    normal = [[-0.6932991, 0.5796633, 0.49631128], [0.24291824, 1.6899344, -0.1874563]]
    np.testing.assert_allclose(source.normal(image, token, Purpose.RESIDUAL, 2, 3)[0], normal, rtol=1e-6)
    uniform = [0.8009707755548844, 0.9933576240494956, 0.032928582113863514]
    np.testing.assert_array_equal(source.uniform(image, token, Purpose.ORDER, 3)[0], uniform)


def test_purposes_keep_their_numbers():
    numbers = {"CHAIN": 0, "ACCEPTANCE": 1, "RESIDUAL": 2, "COMPLETION": 3, "ORDER": 4}
    assert {purpose.name: purpose.value for purpose in Purpose} == numbers


def test_shapes_and_types():
    normal = NoiseSource(1).normal(IMAGE, TOKEN, Purpose.CHAIN, 3, 5)
    uniform = NoiseSource(1).uniform(IMAGE, TOKEN, Purpose.CHAIN, 3)
    assert (normal.shape, normal.dtype) == ((4, 3, 5), np.float32)
    assert (uniform.shape, uniform.dtype) == ((4, 3), np.float64)


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_a_row_depends_on_neither_companions_nor_order(dim):
    source = NoiseSource(7)
    batch = source.normal(IMAGE, TOKEN, Purpose.CHAIN, 3, dim)
    uniform = source.uniform(IMAGE, TOKEN, Purpose.CHAIN, 6)
    for row in range(4):
        alone = IMAGE[row : row + 1], TOKEN[row : row + 1], Purpose.CHAIN
        np.testing.assert_array_equal(source.normal(*alone, 3, dim)[0], batch[row])
        np.testing.assert_array_equal(source.uniform(*alone, 6)[0], uniform[row])
    turned = source.normal(IMAGE[::-1], TOKEN[::-1], Purpose.CHAIN, 3, dim)
    np.testing.assert_array_equal(turned[::-1], batch)


@pytest.mark.parametrize("dim", [1, 4, 5])
def test_a_step_does_not_depend_on_how_many_are_asked_for(dim):
    source = NoiseSource(7)
    many = source.normal(IMAGE, TOKEN, Purpose.CHAIN, 9, dim)
    np.testing.assert_array_equal(source.normal(IMAGE, TOKEN, Purpose.CHAIN, 4, dim), many[:, :4])
    uniform = source.uniform(IMAGE, TOKEN, Purpose.CHAIN, 9)
    np.testing.assert_array_equal(source.uniform(IMAGE, TOKEN, Purpose.CHAIN, 4), uniform[:, :4])


def test_no_two_keys_share_a_stream():
    """Long stretches, so that a stream which runs into its neighbour's is seen too."""
    drawn = [
        NoiseSource(seed).uniform(np.array([image]), np.array([token]), purpose, 500)
        for seed, image, token, purpose in itertools.product((0, 1, 2**63), (0, 1, 2), (0, 1, 2), Purpose)
    ]
    assert len(np.unique(drawn)) == 3 * 3 * 3 * 5 * 500


def test_normals_and_uniforms_of_one_purpose_are_unrelated():
    """A residual draw takes both: the normals must not be made from the uniforms."""
    source, rows, image = NoiseSource(5), np.arange(4000), np.zeros(4000, dtype=np.int64)
    pair = source.normal(image, rows, Purpose.RESIDUAL, 1, 2)[:, 0]
    uniform = source.uniform(image, rows, Purpose.RESIDUAL, 1)[:, 0]
    from_normals = np.exp(-0.5 * np.sum(pair.astype(np.float64) ** 2, axis=1))
    assert abs(np.corrcoef(uniform, from_normals)[0, 1]) < 4 / np.sqrt(4000)


@pytest.fixture(scope="module")
def many():
    """`[20000, 2, 5]` normals of one seed, over images and tokens."""
    image, token = np.divmod(np.arange(20000), 200)
    return NoiseSource(3).normal(image, token, Purpose.CHAIN, 2, 5).astype(np.float64)


def test_attempts_have_draws_of_their_own():
    source = NoiseSource(3)
    drawn = [
        draw
        for attempt in (0, 1, 2)
        for draw in (
            source.normal(IMAGE, TOKEN, Purpose.COMPLETION, 2, 8, attempt).ravel(),
            source.uniform(IMAGE, TOKEN, Purpose.COMPLETION, 16, attempt).ravel(),
        )
    ]
    np.testing.assert_array_equal(drawn[0], source.normal(IMAGE, TOKEN, Purpose.COMPLETION, 2, 8).ravel())
    np.testing.assert_array_equal(drawn[1], source.uniform(IMAGE, TOKEN, Purpose.COMPLETION, 16).ravel())
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 0.5
    assert len({each.tobytes() for each in drawn}) == 6


def test_normals_are_standard(many):
    values = many.ravel()
    assert abs(values.mean()) < 4 / np.sqrt(values.size)
    assert abs(values.var() - 1) < 4 * np.sqrt(2 / values.size)
    assert abs(stats.kurtosis(values)) < 4 * np.sqrt(24 / values.size)
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert stats.kstest(1.03 * values, "norm").pvalue < 1e-4  # the test can tell


def test_steps_and_dimensions_and_neighbours_are_uncorrelated(many):
    columns = many.reshape(len(many), 10)
    correlation = np.corrcoef(np.concatenate([columns[:-1], columns[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(20)).max() < 5 / np.sqrt(len(many))


def test_uniforms_are_uniform():
    image, token = np.divmod(np.arange(2000), 50)
    values = NoiseSource(3).uniform(image, token, Purpose.ACCEPTANCE, 60).ravel()
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert stats.kstest(values**1.03, "uniform").pvalue < 1e-4  # the test can tell


def test_uniforms_never_reach_the_ends():
    ends = noise._open_uniform(np.array([[0, 2**64 - 1]], dtype=np.uint64))[0]
    np.testing.assert_array_equal(ends, [2.0**-53, 1 - 2.0**-53])


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
def test_a_bad_seed_is_refused(seed):
    with pytest.raises(UsageError, match=r"seed is .*expected an integer from 0 to 2\*\*64 - 1; pass"):
        NoiseSource(seed)


# --- the random numbers of tokens ------------------------------------------------------------------------


OF_TOKENS = TokenNoise(NoiseSource(5), IMAGE, TOKEN)
DRAWN = {
    "a chain's": lambda noise: noise.chain(3, 2),
    "acceptance's": lambda noise: noise.acceptance(4, attempt=1),
    "a residual's uniform": lambda noise: noise.residual(2, attempt=1)[0],
    "a residual's normals": lambda noise: noise.residual(2, attempt=1)[1],
    "the normals of residual tries": lambda noise: noise.residual_tries(6, 2)[0],
    "the uniforms of residual tries": lambda noise: noise.residual_tries(6, 2)[1],
    "a completion's": lambda noise: noise.completion(3, 2, attempt=1),
}


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ("a chain's", ("normal", Purpose.CHAIN, 3 + 1, 2)),
        ("acceptance's", ("uniform", Purpose.ACCEPTANCE, 4, 1)),
        ("a residual's normals", ("normal", Purpose.RESIDUAL, 1, 2, 1)),
        ("the normals of residual tries", ("normal", Purpose.RESIDUAL, 6, 2)),
        ("the uniforms of residual tries", ("uniform", Purpose.RESIDUAL, 6)),
        ("a completion's", ("normal", Purpose.COMPLETION, 3, 2, 1)),
    ],
)
def test_a_purpose_of_tokens_is_drawn_with_their_keys(drawn, expected):
    kind, *asked = expected
    wanted = getattr(NoiseSource(5), kind)(IMAGE, TOKEN, *asked)
    found = DRAWN[drawn](OF_TOKENS)
    np.testing.assert_array_equal(found, wanted.reshape(found.shape))


@pytest.mark.parametrize("drawn", DRAWN)
def test_picked_tokens_keep_their_random_numbers(drawn):
    rows = np.array([3, 1])
    found, whole = DRAWN[drawn](OF_TOKENS.pick(rows)), DRAWN[drawn](OF_TOKENS)
    np.testing.assert_array_equal(found, whole[rows])


def test_no_two_of_a_tokens_random_numbers_are_the_same():
    """A completion on the noise of the draft, or on that of an earlier attempt, would be biased."""
    drawn = [draw(OF_TOKENS).ravel() for draw in DRAWN.values()]
    drawn += [OF_TOKENS.completion(3, 2).ravel(), OF_TOKENS.acceptance(4).ravel(), OF_TOKENS.residual(2)[1].ravel()]
    values = np.concatenate(drawn)
    # A residual is one try's proposal, and the first of `residual_tries`: a mode uses the one or the other.
    assert len(np.unique(values)) == len(values) - OF_TOKENS.residual(2)[1].size
