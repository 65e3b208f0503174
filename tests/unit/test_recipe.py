"""Recipes: what they say, and what is said of those that are wrong."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from specdec_rt.build.recipe import GRAPHS, PrecisionTable, Recipe, default_recipe, read_recipe
from specdec_rt.errors import RecipeError

RECIPES = Path(__file__).parents[2] / "engines" / "recipes"
REFERENCE = RECIPES / "reference.toml"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path):
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what is shipped ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend", "precision"),
    [
        ("cpu", "onnxruntime", "fp32"),
        ("rtx", "tensorrt-rtx", "fp16"),
        ("datacenter", "tensorrt", "fp16"),
        ("jetson", "tensorrt", "fp16"),
        ("reference", "tensorrt-rtx", "fp32"),
    ],
)
def test_shipped_recipes_load(name, backend, precision):
    recipe = read_recipe(RECIPES / f"{name}.toml")
    assert (recipe.backend, recipe.precision.default) == (backend, precision)
    assert not recipe.compute_capabilities


def test_every_shipped_recipe_is_tested():
    assert {path.stem for path in RECIPES.iterdir()} == {"cpu", "rtx", "datacenter", "jetson", "reference"}


def test_the_reference_says_the_defaults():
    assert read_recipe(REFERENCE) == default_recipe("tensorrt-rtx")


def documented():
    """The reference with what is commented out put in; and the comment over each key."""
    lines = REFERENCE.read_text(encoding="utf-8").splitlines()
    written = [re.sub(r"^# (?=[a-z_]+ = |\[)", "", line) for line in lines]
    comments, comment, table = {}, [], ""
    for line in written:
        if line.startswith("# "):
            comment.append(line[2:])
        elif line.startswith("["):
            table = line.strip("[]")
            comments[table] = " ".join(comment)
        elif "=" in line:
            comments[f"{table}.{line.split(' =')[0]}".lstrip(".")] = " ".join(comment)
        if not line.startswith("# "):
            comment = comment if line.startswith("[") else []
    return tomllib.loads("\n".join(written)), comments


def stated_default(comment):
    found = re.search(r"Default: (unset|.*?)(?: \(|\.(?: |$))", comment)
    assert found, f"no default in {comment!r}"
    return None if found[1] == "unset" else tomllib.loads(f"value = {found[1]}")["value"]


def test_the_reference_has_every_key():
    document, _ = documented()
    assert set(document) == set(Recipe.model_fields)
    assert set(document["precision"]) == set(PrecisionTable.model_fields)
    assert set(PrecisionTable.model_fields) == {"default", *GRAPHS}
    Recipe.model_validate_json(json.dumps({"backend": "tensorrt", "profiles": document["profiles"]}))


@pytest.mark.parametrize("key", sorted(set(Recipe.model_fields) - {"backend", "precision", "profiles"}))
def test_the_reference_explains_each_key(key):
    _, comments = documented()
    field, comment = Recipe.model_fields[key], comments[key]
    default = field.default
    assert stated_default(comment) == (list(default) if isinstance(default, tuple) else default)
    assert "Unit: " in comment
    bounds = {name: getattr(item, name) for item in field.metadata for name in ("ge", "le") if hasattr(item, name)}
    if bounds:
        assert f"Range: {bounds['ge']} to {bounds['le']}." in comment


@pytest.mark.parametrize("key", sorted(PrecisionTable.model_fields))
def test_the_reference_explains_each_precision(key):
    _, comments = documented()
    assert stated_default(comments[f"precision.{key}"]) == PrecisionTable.model_fields[key].default
    assert 'One of "fp32", "fp16", "bf16".' in comments[f"precision.{key}"]


def test_the_reference_explains_profiles():
    _, comments = documented()
    comment = comments["profiles.backbone.tokens"]
    assert stated_default(comment) is None
    assert "min <= opt <= max" in comment


# --- what a recipe says ------------------------------------------------------------------------------


def test_only_the_backend_is_required(write):
    recipe = read_recipe(write('backend = "tensorrt"\n'))
    assert recipe == default_recipe("tensorrt")
    assert (recipe.batch_buckets, recipe.draft_length, recipe.workspace_mib) == ((1, 4, 16), 4, 4096)
    assert (recipe.middle_batch, recipe.largest_batch) == (4, 16)


def test_there_is_no_default_for_an_unknown_backend():
    with pytest.raises(RecipeError, match=r"recipe: backend is 'tpu'; expected 'tensorrt-rtx', 'tensorrt', 'cuda' or"):
        default_recipe("tpu")


def test_a_graph_takes_its_own_precision_or_the_default(write):
    recipe = read_recipe(write('backend = "tensorrt"\nprecision = { default = "bf16", path_means = "fp32" }\n'))
    assert {graph: recipe.graph_precision(graph) for graph in GRAPHS} == {
        **dict.fromkeys(GRAPHS, "bf16"),
        "path_means": "fp32",
    }


def test_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b'backend = "tensorrt"\r\n\r\ndraft_length = 3\r\n')
    assert read_recipe(path).draft_length == 3


def test_recipes_that_say_the_same_are_equal_wherever_they_stand(write, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text('\n# more\nbackend = "cuda"\n')
    assert read_recipe(write('backend = "cuda"')) == read_recipe(other) != default_recipe("tensorrt")


PROFILE = "[profiles.decoder.tokens]\nmin = [1, 49, 16]\nopt = [1, 49, 16]\nmax = [2, 49, 16]\n"


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("batch_buckets = [1, 2]", set(GRAPHS)),
        ("draft_length = 2", set(GRAPHS)),
        ("cuda_graphs = false", set(GRAPHS)),
        ("builder_level = 2", set(GRAPHS)),
        ("workspace_mib = 2", set(GRAPHS)),
        ('compute_capabilities = ["8.9"]', set(GRAPHS)),
        ('precision.default = "fp16"', set(GRAPHS)),
        ('precision.backbone = "fp16"', {"backbone"}),
        ('precision.backbone = "fp32"', set()),
        (PROFILE, {"decoder"}),
        ("# nothing\n", set()),
    ],
)
def test_what_decides_a_graphs_engine(write, change, changed):
    plain, recipe = default_recipe("tensorrt-rtx"), read_recipe(write(f'backend = "tensorrt-rtx"\n{change}'))
    for graph in GRAPHS:
        fields = recipe.engine_fields(graph)
        assert json.loads(json.dumps(fields)) == fields
        assert (fields != plain.engine_fields(graph)) == (graph in changed)


# --- what is wrong, and where ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "backend is missing; add 'tensorrt-rtx', 'tensorrt', 'cuda' or 'onnxruntime'"),
        ('\nbakend = "cuda"', "unknown key 'bakend'; expected 'backend', "),
        ('\nbakend = "cuda"', "(did you mean 'backend'?)"),
        ('# tpu\nbackend = "tpu"', "backend is 'tpu'; expected 'tensorrt-rtx', 'tensorrt', 'cuda' or 'onnxruntime'"),
        ("backend = 3", "backend is 3; expected 'tensorrt-rtx'"),
        ('backend = "cuda"\n[precison]\ndefault = "fp16"', "unknown key 'precison'"),
        ('backend = "cuda"\n[[more]]\na = 1', "unknown key 'more'"),
        (
            'backend = "cuda"\n[precision]\ndefault = "fp16"\ndecode = "fp16"',
            "unknown key 'precision.decode'; expected 'default', 'backbone', ",
        ),
        (
            'backend = "cuda"\n[precision]\n\ndefault = "fp8"',
            "precision.default is 'fp8'; expected 'fp32', 'fp16' or",
        ),
        ('backend = "cuda"\nprecision.path_means = 16', "precision.path_means is 16; expected 'fp32'"),
        ('backend = "cuda"\nprecision = "fp16"', "precision is 'fp16'; expected a table"),
        (
            'backend = "onnxruntime"\n[precision]\nbackbone = "bf16"',
            "precision.backbone is 'bf16', which ONNX Runtime cannot compute in on a CPU; expected 'fp32' or 'fp16'",
        ),
        (
            'backend = "cuda"\nbatch_buckets = [1,\n 4,\n 2]',
            "batch_buckets is [1, 4, 2]; expected ascending numbers",
        ),
        (
            'backend = "cuda"\nbatch_buckets = [4, 4]',
            "batch_buckets is [4, 4]; expected ascending numbers, as in [4]",
        ),
        ('backend = "cuda"\nbatch_buckets = []', "batch_buckets is []; expected at least one number"),
        ('backend = "cuda"\nbatch_buckets = 4', "batch_buckets is 4; expected a list"),
        ('backend = "cuda"\nbatch_buckets = [\n1,\n"4"]', "batch_buckets.1 is '4'; expected a valid integer"),
        ('backend = "cuda"\nbatch_buckets = [0, 1]', "batch_buckets.0 is 0; expected at least 1"),
        ('backend = "cuda"\ndraft_length = 0', "draft_length is 0; expected at least 1"),
        ('backend = "cuda"\ndraft_length = 4.0', "draft_length is 4.0; expected a valid integer"),
        ('backend = "cuda"\ndraft_length = true', "draft_length is True; expected a valid integer"),
        ('backend = "cuda"\ndraft_length = nan', "draft_length is nan; expected a valid integer"),
        ('backend = "cuda"\ndraft_length = 2024-01-01', "draft_length is '2024-01-01'; expected a valid integer"),
        ('backend = "cuda"\ncuda_graphs = "yes"', "cuda_graphs is 'yes'; expected a valid boolean"),
        ('backend = "tensorrt"\nbuilder_level = 6', "builder_level is 6; expected at most 5"),
        ('backend = "tensorrt"\nworkspace_mib = -1', "workspace_mib is -1; expected at least 1"),
        ('backend = "onnxruntime"\nthreads = 0', "threads is 0; expected at least 1"),
        (
            'backend = "tensorrt-rtx"\ncompute_capabilities = ["sm89"]',
            "compute_capabilities.0 is 'sm89'; expected a compute capability as in '8.9'",
        ),
        (
            'backend = "tensorrt-rtx"\ncompute_capabilities = ["8.9", "8.9"]',
            "compute_capabilities is ['8.9', '8.9']; expected each once",
        ),
        ('backend = "tensorrt"\nprofiles = 3', "profiles is 3; expected a table"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(write, text, said):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize(
    ("backend", "key", "able"),
    [
        ("tensorrt", "threads = 2", "'onnxruntime'"),
        ("cuda", "threads = 2", "'onnxruntime'"),
        ("onnxruntime", "cuda_graphs = true", "'tensorrt-rtx', 'tensorrt' or 'cuda'"),
        ("cuda", "builder_level = 3", "'tensorrt-rtx' or 'tensorrt'"),
        ("onnxruntime", "workspace_mib = 1024", "'tensorrt-rtx' or 'tensorrt'"),
        ("onnxruntime", "timing_cache = true", "'tensorrt'"),
        ("tensorrt-rtx", "timing_cache = true", "'tensorrt'"),
        ("tensorrt", 'compute_capabilities = ["8.9"]', "'tensorrt-rtx'"),
        ("cuda", "profiles = {}", "'tensorrt-rtx' or 'tensorrt'"),
    ],
)
def test_a_key_that_means_nothing_for_the_backend(write, backend, key, able):
    path = write(f'{key}\n\nbackend = "{backend}"\n')
    name = key.split(" =")[0]
    assert refusal(path) == f"{path}: {name} means nothing for backend '{backend}', only for {able}; remove it"


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("[profiles.bakbone.tokens]", "unknown graph 'bakbone' in profiles; expected 'backbone', "),
        ("[profiles.backbone.tokens]\nmin = [1]\nopt = [1]", "profiles.backbone.tokens.max is missing; add it"),
        ("[profiles.backbone]\nmin = [1]", "profiles.backbone.min is [1]; expected a table"),
        (
            "[profiles.backbone.tokens]\nmin = [1]\nmid = [1]\nopt = [1]\nmax = [1]",
            "unknown key 'profiles.backbone.tokens.mid'; expected 'min', 'opt' or 'max'",
        ),
        (
            "[profiles.backbone.tokens]\nmin = [2]\nopt = [1]\nmax = [2]",
            "profiles.backbone.tokens.opt is [1], but min is [2]; expected min <= opt <= max",
        ),
        (
            "[profiles.backbone.tokens]\nmin = [1, 1]\nopt = [2, 2]\nmax = [9, 1]",
            "profiles.backbone.tokens.max is [9, 1], but opt is [2, 2]; expected min <= opt <= max",
        ),
        (
            "[profiles.backbone.tokens]\nmin = [1, 1]\nopt = [2, 2]\nmax = [9]",
            "profiles.backbone.tokens.max is [9], but opt is [2, 2]; expected as many sizes in both",
        ),
        (
            "[profiles.backbone]\nlabel = {min = [0], opt = [1], max = [1]}",
            "profiles.backbone.label.min.0 is 0; expected at least 1",
        ),
    ],
)
def test_a_profile_of_no_possible_shape(write, profile, said):
    path = write(f'backend = "tensorrt"\n{profile}\n')
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("backend = ", "is not TOML: invalid value (at end of document); see"),
        (
            'a = 1\nbackend = "cuda" x',
            "is not TOML: expected newline or end of document after a statement (at line 2,",
        ),
        ('backend = "cuda"\n\nbackend = "cuda"\n', "is not TOML: cannot overwrite a value (at line 3"),
        ("a = 1\n[precision\n", "is not TOML: expected ']'"),
        ("a = 1\nb = [1,\n2\n\n\n", "is not TOML: unclosed array (at end of document); see"),
        ("x = " + "[" * 5000 + "]" * 5000, "is not TOML that can be read"),
        ("x = " + "9" * 5000, "is not TOML that can be read"),
    ],
)
def test_what_is_no_toml(write, text, said):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert message.endswith("see https://toml.io")


def test_what_is_no_text(tmp_path):
    path = tmp_path / "my.toml"
    path.write_bytes(b'backend = "cuda"\n# \xff\n')
    assert refusal(path) == f"{path}: line 2 is not UTF-8 text; save the file as UTF-8"


@pytest.mark.parametrize("name", ["nothing.toml", ".", "a\0b"])
def test_no_recipe_there(tmp_path, name):
    path = tmp_path / name
    message = refusal(path)
    assert message.startswith(f"{path} cannot be read (")
    assert "engines/recipes" in message
