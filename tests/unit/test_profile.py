"""Profiles: they hold every size that decoding asks for, and fit the graphs they are for."""

import json

import pytest
from bundles import copy_bundle, edit_manifest
from hypothesis import given
from hypothesis import strategies as st

from specdec_rt.ar_schedule import cosine_schedule
from specdec_rt.build.profile import graph_profile
from specdec_rt.build.recipe import Recipe, default_recipe, read_recipe
from specdec_rt.bundle import load_bundle
from specdec_rt.capacity import Capacity
from specdec_rt.chain import compile_chain
from specdec_rt.errors import RecipeError
from specdec_rt.manifest import Binding, Decoder, Graph, GraphName, ImageLayout

MANIFESTS = {name: load_bundle(name).manifest for name in ("digits", "digits-mar")}
BUCKETS = st.lists(st.integers(1, 300), min_size=1, max_size=5, unique=True).map(sorted)
GAMMA = st.integers(1, 64)


def recipe_of(buckets=(1, 4, 16), draft_length=4):
    return Recipe.model_validate_json(
        json.dumps({"backend": "tensorrt", "batch_buckets": list(buckets), "draft_length": draft_length})
    )


def graphs_of(manifest):
    return [(manifest.model(name), graph) for name in (None, *manifest.drafts) for graph in manifest.model(name).graphs]


def ranges(manifest, model, graph, recipe):
    """Every symbol's smallest, usual and largest size; they agree in all inputs."""
    found = {}
    made = graph_profile(manifest, model, graph, recipe)
    inputs = manifest.decoder.graph.inputs if model is None else model.graphs[graph].inputs
    assert set(made) == {binding.name for binding in inputs if any(isinstance(size, str) for size in binding.shape)}
    for binding in inputs:
        if binding.name not in made:
            continue
        shapes = made[binding.name]
        assert len(shapes.min) == len(shapes.opt) == len(shapes.max) == len(binding.shape)
        for size, *span in zip(binding.shape, shapes.min, shapes.opt, shapes.max, strict=True):
            assert 1 <= span[0] <= span[1] <= span[2]
            if isinstance(size, int):
                assert span == [size] * 3
            else:
                assert found.setdefault(size, tuple(span)) == tuple(span)
    return found


def backbone(manifest, recipe, model=None):
    return ranges(manifest, model or manifest.target, GraphName.BACKBONE, recipe)


# --- derived -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MANIFESTS))
@given(buckets=BUCKETS, draft_length=GAMMA)
def test_any_recipes_profiles_fit_every_graph(name, buckets, draft_length):
    manifest = MANIFESTS[name]
    recipe = recipe_of(buckets, draft_length)
    n = compile_chain(manifest.chain).length
    for model, graph in graphs_of(manifest):
        sizes = ranges(manifest, model, graph, recipe)
        if graph in (GraphName.DENOISE_STEP, GraphName.PATH_MEANS):
            least = 1 if graph is GraphName.PATH_MEANS else n  # what a draft on the same head left out
            assert sizes["n"] == (least, n, n)
            assert sizes["G"] == (1, 2, 2)
            assert sizes.get("n_plus_1", (least + 1, n + 1, n + 1)) == (least + 1, n + 1, n + 1)


@given(buckets=BUCKETS, draft_length=GAMMA)
def test_a_causal_pairs_calls_fit(buckets, draft_length):
    manifest = MANIFESTS["digits"]
    recipe = recipe_of(buckets, draft_length)
    tokens, drafted = manifest.tokens, min(draft_length, manifest.tokens)
    for model, graph in graphs_of(manifest):
        sizes = ranges(manifest, model, graph, recipe)
        match graph:
            case GraphName.BACKBONE:
                assert sizes["B"][2] == 2 * buckets[-1]
                assert sizes["N"][2] == tokens  # a draft catches up
                assert (sizes["S"][0], sizes["S"][2]) == (tokens, tokens + drafted - 1)
            case GraphName.DENOISE_STEP:
                assert sizes["R"][2] >= buckets[-1] * drafted  # `paper` mode aligns a round
            case GraphName.MODULATION:
                assert_modulation_fits(model, sizes, compile_chain(manifest.chain).length, buckets[-1] * drafted)


@given(buckets=BUCKETS, draft_length=GAMMA, ar_steps=st.integers(1, 49))
def test_a_mar_pairs_calls_fit(buckets, draft_length, ar_steps):
    """Whatever number of AR steps is asked for."""
    manifest = MANIFESTS["digits-mar"]
    recipe = recipe_of(buckets, draft_length)
    known = cosine_schedule(manifest.tokens, ar_steps).known
    drafted = min(draft_length, ar_steps)
    for model, graph in graphs_of(manifest):
        sizes = ranges(manifest, model, graph, recipe)
        match graph:
            case GraphName.BACKBONE:
                assert sizes["B"][2] >= 2 * buckets[-1] * drafted
                assert sizes["K"][0] <= max(known[0], 1) <= known[-2] + 1 <= sizes["K"][2]
                assert max(known[1:] - known[:-1]) <= sizes["Q"][2]
            case GraphName.DENOISE_STEP:
                # `paper` mode aligns a round, each of its steps padded up to the largest.
                assert drafted * max(known[1:] - known[:-1]) * buckets[-1] <= sizes["R"][2]
            case GraphName.MODULATION:
                rows = drafted * max(known[1:] - known[:-1]) * buckets[-1]
                assert_modulation_fits(model, sizes, compile_chain(manifest.chain).length, rows)


def assert_modulation_fits(model, sizes, steps, most):
    for rows in {1, min(2, most), most // 2 or 1, most}:
        pairs = rows * Capacity().modulation_steps(rows, model.modulation_width, steps)
        assert sizes["R"][0] <= rows <= sizes["R"][2]
        assert sizes["P"][0] <= pairs <= sizes["P"][2]


@pytest.mark.parametrize("name", sorted(MANIFESTS))
@given(buckets=BUCKETS, draft_length=GAMMA, branches=st.sampled_from([1, 2]))
def test_a_batch_of_paths_is_judged_within_its_profile(name, buckets, draft_length, branches):
    manifest = MANIFESTS[name]
    n = compile_chain(manifest.chain).length
    sizes = ranges(manifest, manifest.target, GraphName.PATH_MEANS, recipe_of(buckets, draft_length))
    rows = ranges(manifest, manifest.target, GraphName.DENOISE_STEP, recipe_of(buckets, draft_length))["R"][2]
    assert min(rows, Capacity().paths_per_call(branches, manifest.target.modulation_width, n)) <= sizes["R"][2]


def test_profiles_follow_the_capacity():
    manifest = MANIFESTS["digits"]
    sizes = {}
    for capacity in (Capacity(), Capacity(states_per_call=2**7)):
        shapes = graph_profile(manifest, manifest.target, GraphName.PATH_MEANS, recipe_of(), capacity)
        sizes[capacity.states_per_call] = shapes["path"].max[0]
    assert sizes == {2**14: 64, 2**7: 2**7 // 23}


def test_engines_are_tuned_for_what_is_usual():
    """The middle bucket; guided; a target for whole rounds, a draft for one step."""
    causal, mar = MANIFESTS["digits"], MANIFESTS["digits-mar"]
    recipe = recipe_of()
    usual = {symbol: span[1] for symbol, span in backbone(causal, recipe).items()}
    assert usual == {"B": 8, "N": 4, "S": 52}
    assert backbone(causal, recipe, causal.drafts["adapter"])["N"][1] == 1
    assert {symbol: span[1] for symbol, span in backbone(mar, recipe).items()} == {"B": 32, "K": 24, "Q": 3}
    assert backbone(mar, recipe, mar.drafts["adapter"])["B"][1] == 8
    assert ranges(mar, mar.target, GraphName.DENOISE_STEP, recipe)["R"][1] == 12
    assert ranges(causal, causal.target, GraphName.PATH_MEANS, recipe)["R"][1] == 16


def with_decoder(side, tokens):
    """A MAR manifest whose tokens a VAE decodes, as large as MAR-B's where `tokens` is 256."""
    shape = Binding(name="tokens", dtype="float32", shape=("B", tokens, 16))
    pixel = Binding(name="pixels", dtype="float32", shape=("B", side, side, 3))
    graph = Graph(file="decoder.onnx", inputs=(shape,), outputs=(pixel,))
    return MANIFESTS["digits-mar"].model_copy(
        update={
            "tokens": tokens,
            "image": ImageLayout(height=side, width=side, channels=3, patch=16),
            "decoder": Decoder(parameters=1, graph=graph),
            "defaults": MANIFESTS["digits-mar"].defaults.model_copy(update={"ar_steps": min(64, tokens)}),
        }
    )


@pytest.mark.parametrize(
    ("side", "tokens", "span"), [(256, 256, (1, 4, 8)), (64, 16, (1, 4, 128)), (1024, 4096, (1, 1, 1))]
)
def test_a_decoder_takes_as_many_images_as_its_pixels_allow(side, tokens, span):
    assert ranges(with_decoder(side, tokens), None, None, recipe_of()) == {"B": span}


def test_a_model_of_mar_b_s_size():
    manifest = with_decoder(256, 256)
    target = manifest.target
    recipe = recipe_of()
    assert backbone(manifest, recipe) == {"B": (1, 32, 128), "K": (1, 128, 256), "Q": (1, 7, 256)}
    assert ranges(manifest, target, GraphName.DENOISE_STEP, recipe)["R"] == (1, 28, 6208)
    assert ranges(manifest, target, GraphName.PATH_MEANS, recipe)["R"] == (1, 100, 2**25 // (23 * 2816))


@pytest.mark.parametrize("draft_length", [1, 4, 9])
def test_a_bundle_of_one_token(draft_length):
    manifest = MANIFESTS["digits-mar"].model_copy(
        update={"tokens": 1, "defaults": MANIFESTS["digits-mar"].defaults.model_copy(update={"ar_steps": 1})}
    )
    recipe = recipe_of([2], draft_length)
    shapes = graph_profile(manifest, manifest.target, GraphName.BACKBONE, recipe)
    assert (shapes["visible"].min, shapes["visible"].max, shapes["query"].max) == ((1, 1), (4, 1), (4, 1))


# --- the recipe's own --------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "my.toml"
        path.write_text(f'backend = "tensorrt"\n{text}')
        return read_recipe(path)

    return read


def test_an_input_of_the_recipes_stands_for_all_that_share_its_sizes(read):
    manifest = MANIFESTS["digits"]
    recipe = read("[profiles.backbone]\ntokens = { min = [1, 1, 16], opt = [2, 4, 16], max = [6, 8, 16] }")
    assert backbone(manifest, recipe) == {"B": (1, 2, 6), "N": (1, 4, 8), "S": (49, 52, 52)}
    shapes = graph_profile(manifest, manifest.target, GraphName.BACKBONE, recipe)
    assert shapes["key_0"].max == (6, 6, 52, 32)
    other = (manifest, manifest.target, GraphName.DENOISE_STEP)
    assert graph_profile(*other, recipe) == graph_profile(*other, default_recipe("tensorrt"))


def test_inputs_may_repeat_what_another_says(read):
    recipe = read("[profiles.backbone]\nlabel = {min=[1], opt=[2], max=[6]}\nposition = {min=[1], opt=[2], max=[6]}")
    assert backbone(MANIFESTS["digits"], recipe)["B"] == (1, 2, 6)


@pytest.mark.parametrize(
    ("graph", "text", "said"),
    [
        (
            "backbone",
            "[profiles.backbone.token]\nmin = [1]\nopt = [1]\nmax = [1]",
            "profiles.backbone.token: unknown input 'token' of backbone; expected one of tokens, position, label, ",
        ),
        (
            "backbone",
            "[profiles.backbone.tokens]\nmin = [1, 1]\nopt = [1, 1]\nmax = [1, 1]",
            "profiles.backbone.tokens has 2 sizes; expected 3, as the input is [B, N, 16]",
        ),
        (
            "backbone",
            "[profiles.backbone.tokens]\nmin = [1, 1, 16]\nopt = [1, 1, 16]\nmax = [1, 1, 17]",
            "profiles.backbone.tokens.max has 17 where the bundle's graph has a size of 16; put 16",
        ),
        (
            "backbone",
            "[profiles.backbone]\nlabel = {min=[1], opt=[2], max=[6]}\nposition = {min=[1], opt=[2], max=[7]}",
            "profiles.backbone.position gives size B as [1, 2, 7] (min, opt, max), but label gives [1, 2, 6]",
        ),
        (
            "backbone",
            "[profiles.backbone.key_0]\nmin = [1, 6, 1, 32]\nopt = [1, 6, 9, 32]\nmax = [1, 6, 48, 32]",
            "profiles.backbone.key_0.max: size S runs from 1 to 48, which leaves out 49, a size that this bundle needs",
        ),
        (
            "time_embedding",
            "[profiles.time_embedding.timestep]\nmin = [24]\nopt = [24]\nmax = [50]",
            "profiles.time_embedding.timestep.min: size n runs from 24 to 50, which leaves out 23",
        ),
        (
            "denoise_step",
            "[profiles.denoise_step.coefficients]\nmin = [1, 4]\nopt = [23, 4]\nmax = [23, 4]",
            "profiles.denoise_step.coefficients.min has 1 where the bundle's graph has size n = 23; put 23",
        ),
        (
            "path_means",
            "[profiles.path_means.path]\nmin = [1, 24, 16]\nopt = [1, 24, 16]\nmax = [1, 24, 16]",
            "profiles.path_means.path.min: size n_plus_1 runs from 24 to 24, which leaves out 2, a size",
        ),
    ],
)
def test_a_profile_that_does_not_fit_the_graph(read, graph, text, said):
    manifest = MANIFESTS["digits"]
    recipe = read(text)
    with pytest.raises(RecipeError) as caught:
        graph_profile(manifest, manifest.target, GraphName(graph), recipe)
    assert str(caught.value).startswith(f"{recipe.path}: ")
    assert said in str(caught.value)


def test_a_decoders_own_profile(read):
    manifest = with_decoder(64, 16)
    text = "[profiles.decoder.tokens]\nmin = [1, {0}, 16]\nopt = [1, {0}, 16]\nmax = [2, {0}, 16]"
    assert graph_profile(manifest, None, None, read(text.format(16)))["tokens"].max == (2, 16, 16)
    with pytest.raises(RecipeError, match=r"my\.toml: profiles\.decoder\.tokens\.min has 49 where"):
        graph_profile(manifest, None, None, read(text.format(49)))


def test_a_chain_of_another_length(tmp_path):
    folder = copy_bundle(tmp_path / "copy")
    edit_manifest(folder, "chain", "steps", value=50)
    manifest = load_bundle(folder).manifest
    assert ranges(manifest, manifest.target, GraphName.TIME_EMBEDDING, recipe_of())["n"] == (1, 48, 48)


def test_parts_of_a_chain_stay_within_a_recipes_reach(read):
    manifest = MANIFESTS["digits"]
    text = "[profiles.path_means.coefficients]\nmin = [{0}, 4]\nopt = [23, 4]\nmax = [23, 4]"
    asked = manifest, manifest.target, GraphName.PATH_MEANS
    assert graph_profile(*asked, read(text.format(1)))["coefficients"].min == (1, 4)
    with pytest.raises(RecipeError, match=r"size n runs from 23 to 23, which leaves out 1, a size"):
        graph_profile(*asked, read(text.format(23)))


# --- a builder's opinion -----------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [GraphName.MODULATION, GraphName.DENOISE_STEP, GraphName.PATH_MEANS])
def test_a_builder_takes_derived_profiles(graph):
    trt = pytest.importorskip("tensorrt_rtx")
    bundle = load_bundle("digits")
    model = bundle.manifest.drafts["small"]
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundle.folder / model.graphs[graph].file))
    wanted = builder.create_optimization_profile()
    for name, shapes in graph_profile(bundle.manifest, model, graph, default_recipe("tensorrt-rtx")).items():
        wanted.set_shape(name, shapes.min, shapes.opt, shapes.max)
    assert wanted
    config = builder.create_builder_config()
    assert config.add_optimization_profile(wanted) == 0
    assert builder.build_serialized_network(network, config) is not None
