"""`export.parity` replays recorded references through a bundle's engines, and fails where it must."""

from pathlib import Path

import numpy as np
import pytest
from recorder import random_mar, record, save_published

from export.mar import main as export_mar
from export.parity import main as parity
from export.replay import replay
from specdec_rt import load

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 21
"""Denoising steps of the model of other sizes."""


@pytest.fixture(scope="module")
def pipeline(stock):
    return load(stock)


@pytest.fixture(scope="module")
def recorded():
    """The arrays that the public reference recorded."""
    with np.load(GOLDEN / "mar_reference.npz") as arrays:
        return dict(arrays)


def failures(pipeline, arrays, folder):
    """The names of quantities that fail where `arrays` are what was recorded."""
    path = folder / "altered.npz"
    np.savez(path, **arrays)
    return {comparison.name for comparison in replay(pipeline, path) if not comparison.passed}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model of other sizes than the reference, whose patches are 2 x 2 latent positions, and its bundle."""
    folder, model = tmp_path_factory.mktemp("other"), random_mar()
    save_published(model, folder / "model.pth", num_sampling_steps=str(STEPS))
    argv = ["--checkpoint", folder / "model.pth", "--compute", "fp32", "--out", folder / "bundle"]
    assert export_mar([str(word) for word in argv]) == 0
    return model, load(folder / "bundle")


@pytest.mark.parametrize(
    "recording",
    [
        pytest.param(
            {"ar_steps": 5, "guidance": 3.5, "schedule": "constant", "temperature": 1.0}, id="constant guidance"
        ),
        pytest.param({"ar_steps": 9, "guidance": 1.5, "schedule": "linear", "temperature": 0.9}, id="a token a step"),
    ],
)
def test_a_model_of_other_sizes_passes(other, tmp_path, recording):
    model, pipeline = other
    arrays = record(model, steps=STEPS, **recording)
    assert failures(pipeline, arrays, tmp_path) == set()
    altered = {**arrays, "image_cfg": arrays["image_cfg"] * np.float32(1.01)}
    assert failures(pipeline, altered, tmp_path) == {"image_cfg"}


def test_the_public_references_recording_passes(stock, capsys):
    assert parity([str(stock), str(GOLDEN / "mar_reference.npz")]) == 0
    output = capsys.readouterr()
    assert "19 of 19 quantities passed" in output.out
    assert "comparing image_cfg" in output.err


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("tokens", {"z_16", "z_uncond_16", "z_32", "z_uncond_32", "z_63", "z_uncond_63"}),
        ("z_uncond_32", {"z_uncond_32"}),
        ("head_x", {"head_out", "p_mean", "p_log_variance", "p_xstart"}),
        ("p_log_variance", {"p_log_variance"}),
        ("betas", {"betas"}),
        ("chain_plain_xT", {"chain_plain_x"}),
        ("chain_cfg_x", {"chain_cfg_x"}),
        ("image_plain_xT_7", {"image_plain"}),
        ("image_cfg", {"image_cfg"}),
        ("mask_16", {"z_16", "z_uncond_16"}),
    ],
)
def test_an_array_altered_by_one_percent_is_seen(pipeline, recorded, tmp_path, name, failing):
    altered = {**recorded, name: recorded[name] * recorded[name].dtype.type(1.01)}
    assert failures(pipeline, altered, tmp_path) == failing


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("p_xstart", {"p_xstart"}),
        ("head_c", {"head_timestep", "head_out", "p_mean", "p_log_variance", "p_xstart"}),
        ("image_plain_noise_3", {"image_plain"}),
        ("meta", {"chain_plain_x", "chain_cfg_x", "image_plain", "image_cfg"}),
        ("orders", {"image_plain", "image_cfg"}),
    ],
)
def test_what_is_missing_fails(pipeline, recorded, tmp_path, name, failing):
    kept = {key: value for key, value in recorded.items() if key != name}
    assert failures(pipeline, kept, tmp_path) == failing


def test_other_number_types_pass(pipeline, recorded, tmp_path):
    wide = {name: array.astype(np.float64) for name, array in recorded.items() if array.dtype.kind in "fi"}
    assert failures(pipeline, {**recorded, **wide}, tmp_path) == set()


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("head_step", lambda array: array + 100),
        ("chain_plain_noise", lambda array: array[1:]),
        ("chain_cfg_z", lambda array: array[:, 1:]),
        ("tokens", lambda array: array[:2]),
        ("image_cfg_noise_2", lambda array: array[1:]),
        ("meta", lambda array: array[:0]),
        ("labels", lambda array: array + 10),
    ],
)
def test_an_array_of_another_kind_fails_by_name(pipeline, recorded, tmp_path, name, alter):
    path = tmp_path / "altered.npz"
    np.savez(path, **{**recorded, name: alter(recorded[name])})
    problems = [comparison.problem for comparison in replay(pipeline, path) if not comparison.passed]
    assert problems
    assert all(name in problem for problem in problems)


def test_a_reference_without_masks_fails(pipeline, recorded, tmp_path):
    kept = {key: value for key, value in recorded.items() if not key.startswith("mask_")}
    assert failures(pipeline, kept, tmp_path) == {"z_K"}


def test_the_command_says_no_by_its_exit_code(stock, recorded, tmp_path, capsys):
    path = tmp_path / "altered.npz"
    np.savez(path, **{**recorded, "z_16": recorded["z_16"] * np.float32(1.01)})
    assert parity([str(stock), str(path)]) == 1
    assert "18 of 19 quantities passed" in capsys.readouterr().out
    (tmp_path / "torn.npz").write_bytes(path.read_bytes()[:1000])
    assert parity([str(stock), str(tmp_path / "torn.npz")]) == 2
    np.save(tmp_path / "one.npy", recorded["tokens"])
    assert parity([str(stock), str(tmp_path / "one.npy")]) == 2
    assert parity(["digits", str(path)]) == 2
    assert "family 'causal'" in capsys.readouterr().err
