"""Graphs of MAR models: their form, and their results against what the public reference recorded."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from comparing import relative_error

from export.graphs import LATENT_SCALE, DecoderGraph
from export.mar_models import read_mar_pair
from export.models.mar import visible_set
from export.to_onnx import OPSET
from specdec_rt.bundle import load_bundle
from specdec_rt.chain import compile_chain

RECORDED = Path(__file__).parents[1] / "golden" / "mar_reference.npz"
KNOWN = (0, 16, 32, 63)


@pytest.fixture(scope="module")
def recorded():
    """The recorded arrays: B=3, L=64, D=16, Z=64."""
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def run(folder, graph, **inputs):
    """What ONNX Runtime computes from the inputs, with its own optimisations."""
    session = onnxruntime.InferenceSession(str(folder / f"{graph}.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def test_graphs_of_a_head_share_its_weights(stock):
    weights = {}
    for name in ("backbone", "modulation", "denoise_step", "path_means"):
        model = onnx.load(stock / f"target.{name}.onnx", load_external_data=False)
        tensors = (tensor.external_data for tensor in model.graph.initializer)
        weights[name] = {tuple(entry.value for entry in data) for data in tensors if data}
        assert len(weights[name]) >= 4
    assert weights["path_means"] == weights["denoise_step"]
    assert not weights["modulation"] & weights["denoise_step"]
    assert not weights["backbone"] & weights["path_means"]


@pytest.mark.parametrize("known", KNOWN)
def test_z_is_the_references(stock, recorded, known):
    unknown = recorded[f"mask_{known}"] == 1
    visible, visible_mask = visible_set(torch.from_numpy(recorded[f"mask_{known}"]))
    query = np.stack([np.flatnonzero(row) for row in unknown])
    for label, name in ((recorded["labels"], "z"), (np.full(3, 10), "z_uncond")):
        (z,) = run(
            stock,
            "target.backbone",
            tokens=recorded["tokens"],
            visible=visible.numpy(),
            visible_mask=visible_mask.numpy(),
            label=label,
            query=query,
        )
        assert relative_error(z.reshape(-1, z.shape[2]), recorded[f"{name}_{known}"][unknown]) <= 1e-4


def head_inputs(folder, recorded, chain):
    """Inputs that both graphs of a head take beside states: two branches, the second of weight 0."""
    (time_table,) = run(folder, "target.time_embedding", timestep=chain.timestep)
    z = recorded["head_c"]
    guidance = np.stack([np.ones(len(z)), np.zeros(len(z))]).astype(np.float32)
    coefficients = chain.coefficients.astype(np.float32)
    return {"z": np.stack([z, z[::-1]]), "guidance": guidance, "time_table": time_table, "coefficients": coefficients}


def transition(folder, shared, step, **inputs):
    """One transition of each row, after its modulation was computed."""
    given = {name: shared[name] for name in ("z", "time_table")}
    (modulation,) = run(folder, "target.modulation", row=np.arange(len(step)), step=step, **given)
    given = {name: shared[name] for name in ("guidance", "coefficients")}
    given["modulation"] = modulation.reshape(len(step), 2, -1)
    return run(folder, "target.denoise_step", step=step, **given, **inputs)


def test_transitions_are_the_references(stock, recorded):
    """Means, and variances, which the first branch alone decides."""
    chain = compile_chain(load_bundle(stock).manifest.chain)
    shared, state = head_inputs(stock, recorded, chain), recorded["head_x"]
    noise = np.random.default_rng(0).standard_normal(state.shape, dtype=np.float32)
    step = chain.length - 1 - recorded["head_step"]
    next_state, mean, std = transition(stock, shared, step, state=state, noise=noise)
    assert relative_error(mean, recorded["p_mean"]) <= 1e-4
    assert relative_error(2 * np.log(std), recorded["p_log_variance"]) <= 1e-4
    np.testing.assert_allclose(next_state, mean + std * noise, rtol=1e-5, atol=1e-5)
    path = np.broadcast_to(state[:, None], (len(state), chain.length + 1, state.shape[1])).copy()
    rows, steps = np.arange(len(state)), np.arange(chain.length)
    pairs = {"row": np.tile(rows, chain.length), "step": np.repeat(steps, len(rows))}
    (modulation,) = run(stock, "target.modulation", **pairs, **{name: shared[name] for name in ("z", "time_table")})
    given = {name: shared[name] for name in ("guidance", "coefficients")}
    given["modulation"] = modulation.reshape(chain.length, len(rows), 2, -1)
    means, stds = run(stock, "target.path_means", path=path, **given)
    assert relative_error(means[rows, step], mean) <= 1e-5
    assert relative_error(stds[rows, step], std) <= 1e-5


def test_the_stock_chain_ends_without_noise(stock, recorded):
    chain = compile_chain(load_bundle(stock).manifest.chain)
    state = recorded["head_x"]
    last = np.full(len(state), chain.length - 1)
    shared = head_inputs(stock, recorded, chain)
    next_state, mean, std = transition(stock, shared, last, state=state, noise=np.ones_like(state))
    np.testing.assert_array_equal(std, np.zeros_like(state))
    np.testing.assert_array_equal(next_state, mean)
    assert np.isfinite(mean).all()


def test_a_tokens_values_stand_channel_by_channel():
    """As in the reference: x.reshape(B, h, w, c, p, p), then einsum nhwcpq->nchpwq."""

    class Latents(torch.nn.Module):
        def forward(self, latents):
            return latents

    tokens = torch.randn(2, 9, 4 * 2 * 2)
    latents = torch.einsum("nhwcpq->nchpwq", tokens.reshape(2, 3, 3, 4, 2, 2)).reshape(2, 4, 6, 6)
    found = DecoderGraph(Latents(), patch=2)(tokens)
    torch.testing.assert_close(found.permute(0, 3, 1, 2) * LATENT_SCALE, latents)


def test_a_fixed_chain_ignores_what_the_head_says_of_variances(exact, pair, recorded):
    chain = compile_chain(pair.chain)
    state = recorded["head_x"]
    noise = np.ones_like(state)
    step = np.arange(len(state)) % chain.length
    shared = head_inputs(exact, recorded, chain)
    next_state, mean = transition(exact, shared, step, state=state, noise=noise)
    np.testing.assert_allclose(next_state - mean, chain.std[step, None] * noise, rtol=1e-3)
    head = read_mar_pair(exact).target.head
    with torch.no_grad():
        timestep = torch.from_numpy(chain.timestep[step])
        condition = head.time_embed(timestep) + head.cond_embed(torch.from_numpy(recorded["head_c"]))
        epsilon = head(torch.from_numpy(state), condition)[:, :16].numpy()
    of_state, of_epsilon = chain.coefficients[step, :2, None].transpose(1, 0, 2)
    assert relative_error(mean, of_state * state + of_epsilon * epsilon) <= 1e-4


def test_pixels_are_the_vaes(exact):
    pair = read_mar_pair(exact)
    tokens = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    (pixels,) = run(exact, "decoder", tokens=tokens.numpy())
    with torch.no_grad():
        expected = pair.vae(tokens.transpose(1, 2).reshape(2, 16, 4, 4) / 0.2325)
    assert relative_error(pixels, expected.permute(0, 2, 3, 1).numpy()) <= 1e-4


@pytest.mark.parametrize("bundle", ["stock", "exact"])
def test_graphs_are_as_the_manifest_says(request, bundle):
    folder = request.getfixturevalue(bundle)
    manifest = load_bundle(folder).manifest
    models = [manifest.target, *manifest.drafts.values()]
    graphs = [graph for model in models for graph in model.graphs.values()]
    for graph in [*graphs, *([manifest.decoder.graph] if manifest.decoder else [])]:
        onnx.checker.check_model(str(folder / graph.file), full_check=True)
        model = onnx.load(folder / graph.file, load_external_data=False)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {OPSET}
        assert not {node.op_type for node in model.graph.node} & {"NonZero", "Attention", "If", "Loop"}
        for values, bindings in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
            found = [
                (value.name, tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim))
                for value in values
            ]
            assert found == [(binding.name, binding.shape) for binding in bindings]
