"""The command line: what it writes, what it prints where, and how it refuses."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest
from PIL import Image

import specdec_rt
from specdec_rt.cli.generate import parse_labels
from specdec_rt.cli.sheet import SheetLayout, draw_sheet
from specdec_rt.errors import UsageError

JSON_FIELDS = [
    "mode",
    "backend",
    "images",
    "rounds",
    "acceptance_rate",
    "tokens_per_round",
    "draft_lengths",
    "target_backbone_calls",
    "draft_backbone_calls",
    "sequential_head_calls",
    "seconds",
    "images_per_second",
]
QUICK = ("--labels", "3", "--mode", "draft")


@pytest.fixture
def refused(run, tmp_path):
    """Runs a command line that must be refused; returns the message, having seen that no file appeared."""

    def refused(*arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        assert err.startswith("error: ")
        return err

    return refused


def pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


# --- labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("0-9", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("7", [7]),
        ("1,3-5", [1, 3, 4, 5]),
        ("5,1,1", [5, 1, 1]),
        ("4-4", [4]),
        (" 1 , 2 - 3 ", [1, 2, 3]),
    ],
)
def test_labels_are_numbers_and_ranges_in_the_order_given(text, labels):
    assert parse_labels(text, 10) == labels


def test_labels_must_be_chosen_where_there_are_many_classes():
    assert parse_labels("207,360", 1000) == [207, 360]
    with pytest.raises(UsageError, match=r"no labels were given; the bundle has 1000 classes.*--labels"):
        parse_labels(None, 1000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is not a label; expected a list such as 0-9 or 1,3-5"),
        ("a", "'a' is not a label"),
        ("1,,2", "'' is not a label"),
        ("-1", "'-1' is not a label"),
        ("1-", "'1-' is not a label"),
        ("1.5", "'1.5' is not a label"),
        ("1-2-3", "'1-2-3' is not a label"),
        ("1\n-2,٣", "'٣' is not a label"),
        ("9" * 5000, "is not a label"),
        ("5-2", "'5-2' runs backwards; write 2-5"),
        ("10", "labels holds 10; expected 0 to 9"),
        ("0-999999999", "labels holds 999999999; expected 0 to 9"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(text, said):
    with pytest.raises(UsageError) as caught:
        parse_labels(text, 10)
    assert said in str(caught.value)


# --- what generate writes and prints -------------------------------------------------------------------


def test_plain_generate_draws_one_of_each_digit(run, tmp_path):
    code, out, err = run("generate", "--mode", "draft")
    assert (code, out) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["digits.png"]
    layout = SheetLayout.of(labels=10, per_label=1, height=28, width=28)
    images = specdec_rt.load().generate(range(10), mode="draft").images
    np.testing.assert_array_equal(pixels("digits.png"), draw_sheet(images, layout)[:, :, 0])
    assert "wrote digits.png" in err
    assert "490 in 10 images" in err


def test_the_table_shows_what_was_drafted_accepted_and_called(run):
    code, _, err = run("generate", "--labels", "3", "--draft", "self", "--out", "x.png")
    assert code == 0
    for words in (
        "mode exact: exactly the target's",
        "draft tokens proposed",
        "draft tokens accepted",
        "tokens per round",
    ):
        assert words in err
    for words in ("target backbone calls", "per token", "sequential head calls", "images per second"):
        assert words in err


def test_json_and_arrays_hold_what_the_api_returns(run, tmp_path):
    code, out, err = run(
        "generate", "--labels", "0,7", "--count", "2", "--mode", "target", "--seed", "5", "--json", "--tokens", "t.npz"
    )
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
    assert out.count("\n") == 1
    record = json.loads(out)
    assert list(record) == JSON_FIELDS
    assert (record["mode"], record["backend"], record["images"]) == ("target", "onnxruntime", 4)
    assert (record["rounds"], record["acceptance_rate"], record["tokens_per_round"]) == (0, None, None)
    assert (record["target_backbone_calls"], record["draft_backbone_calls"]) == (4 * 49, 0)
    with np.load("t.npz") as arrays:
        found = dict(arrays)
    result = specdec_rt.load().generate([0, 0, 7, 7], seed=5, mode="target")
    assert sorted(found) == ["images", "labels", "tokens"]
    np.testing.assert_array_equal(found["labels"], [0, 0, 7, 7])
    assert (found["images"].dtype, found["images"].shape) == (np.uint8, (4, 28, 28, 1))
    np.testing.assert_array_equal(found["images"], result.images)
    assert (found["tokens"].dtype, found["tokens"].shape) == (np.float32, (4, 49, 16))
    np.testing.assert_allclose(found["tokens"], result.tokens, atol=1e-4)


def test_json_of_exact_decoding_counts_rounds_and_acceptance(run):
    code, out, _ = run("generate", "--labels", "4", "--draft", "self", "--json", "--out", "x.png")
    record = json.loads(out)
    assert code == 0
    assert list(record) == JSON_FIELDS
    assert 0 <= record["acceptance_rate"] <= 1
    assert record["tokens_per_round"] == 1
    assert record["rounds"] == record["target_backbone_calls"] == 49
    assert record["draft_lengths"] == {"1": 49}


def test_draft_length_auto_counts_rounds_by_the_length_chosen(run):
    arguments = ("generate", "--labels", "4", "--draft", "self", "--draft-length", "auto", "--out", "x.png")
    code, out, _ = run(*arguments, "--json")
    record = json.loads(out)
    assert code == 0
    assert set(record["draft_lengths"]) <= {"0", "1"}
    assert sum(record["draft_lengths"].values()) == record["target_backbone_calls"] == 49


def test_a_folder_gets_one_png_for_each_image(run, tmp_path):
    code, _, err = run("generate", "--labels", "7,2", "--count", "2", "--mode", "draft", "--out-dir", "many")
    assert code == 0
    names = ["00000-7.png", "00001-7.png", "00002-2.png", "00003-2.png"]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
    images = specdec_rt.load().generate([7, 7, 2, 2], mode="draft").images
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / "many" / name), image[:, :, 0])
    assert "wrote many" in err


def test_all_outputs_can_be_asked_for_and_replace_older_files(run, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "kept.txt").write_text("mine")
    (tmp_path / "x.PNG").write_text("old")
    code, _, _ = run("generate", *QUICK, "--out", "x.PNG", "--out-dir", "many", "--tokens", "t.npz")
    assert code == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["many/00000-3.png", "many/kept.txt", "t.npz", "x.PNG"]
    assert pixels("x.PNG").shape == (120, 120)


def figures(record):
    """Those of a request that do not depend on the clock, as JSON has them."""
    return {name: value for name, value in json.loads(json.dumps(record)).items() if "second" not in name}


def test_every_decoding_option_has_the_effect_that_it_has_in_the_api(run):
    options = {
        "mode": "paper",
        "draft": "small",
        "draft_length": 1,
        "draft_steps": 3,
        "tau": 9.0,
        "prefill": 0.3,
        "guidance": 3.0,
        "guidance_schedule": "linear",
        "temperature": 0.9,
        "ar_steps": 5,
    }
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    request = ("--labels", "1-2", "--seed", "8", "--batch-size", "2", "--tokens", "t.npz", "--json")
    code, out, _ = run("generate", "digits-mar", *flags, *request)
    assert code == 0
    with np.load("t.npz") as arrays:
        tokens = arrays["tokens"]

    pipeline = specdec_rt.load("digits-mar")
    same = pipeline.generate([1, 2], seed=8, **options)
    np.testing.assert_allclose(tokens, same.tokens, atol=1e-4)
    assert figures(json.loads(out)) == figures(same.stats.as_dict())
    for left_out in options:
        other = pipeline.generate([1, 2], seed=8, **{name: options[name] for name in options if name != left_out})
        same_tokens = np.abs(other.tokens - tokens).max() < 1e-2
        same_figures = figures(other.stats.as_dict()) == figures(same.stats.as_dict())
        assert not (same_tokens and same_figures), f"{left_out} has no effect here"


# --- inspect -------------------------------------------------------------------------------------------


def test_inspect_shows_what_a_bundle_holds(run, tmp_path):
    code, out, err = run("inspect")
    assert (code, err) == (0, "")
    for words in ("causal", "49 of 16 values", "28 x 28 x 1", "final_std", "draft adapter", "tokens [B,"):
        assert words in out
    assert "computes in" in out
    assert list(tmp_path.iterdir()) == []


def test_inspect_json_holds_the_manifest_sizes_and_modes(run):
    code, out, _ = run("inspect", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["name"], record["tokens"], record["token_dim"], record["classes"]) == ("digits", 49, 16, 10)
    assert record["chain"]["transitions"] == record["chain"]["steps"] - record["chain"]["drop_last"]
    assert record["modes"]["exact"] == {"works": True, "why_not": None}
    assert sorted(record["models"]) == ["drafts.adapter", "drafts.small", "target"]
    graph = record["models"]["target"]["graphs"]["denoise_step"]
    assert graph["size_bytes"] > 0
    assert [binding["name"] for binding in graph["outputs"]] == ["next_state", "mean"]


def test_inspect_says_why_mode_exact_cannot_work(run, tmp_path):
    folder = copy_bundle(tmp_path / "copy")
    edit_manifest(folder, "chain", "final_std", value=0.0)
    edit_manifest(folder, "provenance", "note", value="[bold]not markup[/nonsense]")
    mode = json.loads(run("inspect", folder, "--json")[1])["modes"]["exact"]
    assert not mode["works"]
    assert "chain.final_std is 0.0" in mode["why_not"]
    out = run("inspect", folder)[1]
    assert "no: mode 'exact' needs noise" in out
    assert "[bold]not markup[/nonsense]" in out


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--labels", "0-10"), "labels holds 10; expected 0 to 9"),
        (("--labels", "x"), "'x' is not a label"),
        (("--count", "0"), "count is 0; expected a whole number of at least 1"),
        (("--count", "10000000"), "ask for fewer images, or for --out-dir or --tokens instead of a sheet"),
        (("--batch-size", "0"), "batch_size is 0; expected"),
        (("--seed", "-1"), "seed is -1; expected"),
        (("--mode", "fast"), "mode is 'fast'; expected one of exact, paper, target, draft"),
        (("--draft", "nobody"), "draft is 'nobody'; bundle 'digits' has"),
        (("--draft-length", "-1"), "draft_length is -1; expected a whole number of at least 1, or 'auto'"),
        (("--draft-length", "0"), "draft_length is 0; expected a whole number of at least 1, or 'auto'"),
        (("--draft-length", "some"), "draft_length is 'some'; expected a whole number of at least 1, or 'auto'"),
        (("--draft-length", "2.5"), "draft_length is '2.5'; expected a whole number"),
        (("--draft-length", "auto", "--mode", "paper"), "draft_length is 'auto', but in mode 'paper'"),
        (("--draft-steps", "0"), "draft_steps is 0; expected"),
        (("--tau", "0"), "tau is 0.0; expected a number above 0"),
        (("--tau", "nan"), "tau is nan; expected"),
        (("--prefill", "2"), "prefill is 2.0; expected a share from 0 to 1"),
        (("--guidance", "-1"), "guidance is -1.0; expected"),
        (("--guidance-schedule", "cosine"), "guidance_schedule is 'cosine'; expected"),
        (("--temperature", "0"), "temperature is 0.0; expected"),
        (("--ar-steps", "7"), "ar_steps is 7; a causal family"),
        (("--backend", "cuda9"), "backend is 'cuda9'; expected one of"),
        (("--threads", "0"), "threads is 0; expected"),
        (("no/such/bundle",), "no bundle at 'no/such/bundle': expected a folder that holds manifest.json"),
    ],
)
def test_bad_values_are_named_with_what_was_expected(refused, arguments, said):
    assert said in refused("generate", *arguments)


@pytest.mark.parametrize("arguments", [("--tau", "x"), ("--labels",), ("--nothing",), ("--count", "1.5"), ("a", "b")])
def test_bad_usage_ends_with_2_and_no_traceback(run, tmp_path, arguments):
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "")
    assert "Error" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bundle_is_refused_with_the_file_s_name(refused, tmp_path):
    folder = copy_bundle(tmp_path / "copy")
    (folder / "target.backbone.onnx").write_bytes(b"")
    assert f"{folder / 'target.backbone.onnx'} has SHA-256" in refused("generate", folder)
    assert f"{folder / 'target.backbone.onnx'} has SHA-256" in refused("inspect", folder, "--json")


def test_a_chain_on_which_exact_cannot_work_is_refused_with_its_field(refused, tmp_path):
    folder = copy_bundle(tmp_path / "copy")
    edit_manifest(folder, "chain", "t_max", value=999)
    assert "chain.t_max = 999" in refused("generate", folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "missing/x.png"), "there is no folder missing; make it first"),
        (("--out", "folder"), "folder is a folder; expected the name of a .png file"),
        (("--out", "x.jpg"), "x.jpg does not end in .png"),
        (("--out", "x"), "x does not end in .png"),
        (("--out", "file/x.png"), "there is no folder file"),
        (("--out", "a" * 300 + ".png"), "cannot be written (File name too long)"),
        (("--out-dir", "missing/folder"), "there is no folder missing"),
        (("--out-dir", "file"), "file is a file; expected the name of a folder"),
        (("--tokens", "missing/t.npz"), "there is no folder missing"),
        (("--tokens", "t.npy"), "t.npy does not end in .npz"),
        (("--out", "good.png", "--tokens", "missing/t.npz"), "there is no folder missing"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(refused, tmp_path, arguments, said):
    """The request itself would refuse this seed, so the outputs are checked before it begins."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    assert said in refused("generate", *QUICK, "--seed", "-1", *arguments)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("arguments", [("--out", "locked/x.png"), ("--out-dir", "locked"), ("--out-dir", "locked/new")])
def test_a_folder_without_permission_is_refused(refused, tmp_path, arguments):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written (Permission denied)" in refused("generate", *QUICK, *arguments)


def test_a_file_that_cannot_be_finished_leaves_no_other_behind(tmp_path):
    pytest.importorskip("resource", reason="the size of files cannot be limited here")
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from specdec_rt.cli import main; main()"
    )
    arguments = ("generate", *QUICK, "--count", "4", "--out-dir", "small", "--tokens", "large.npz")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: large.npz cannot be written (File too large); choose another place\n"
    assert list(tmp_path.iterdir()) == []


# --- the process ---------------------------------------------------------------------------------------


def test_a_terminal_shows_a_bar_and_an_interrupt_ends_with_130_and_leaves_nothing(tmp_path):
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    script = (
        "import signal\n"
        # As on a terminal, also where the tests run in the background of a shell, which ignores interrupts there.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from specdec_rt.cli import main; main()"
    )
    arguments = ("generate", "--mode", "target", "--count", "100", "--out-dir", "many")
    terminal, stderr = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=tmp_path,
            env={**os.environ, "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        os.close(stderr)
        with process:
            shown = b""
            while b"/49000" not in shown:  # the bar: decoding is under way
                shown += screen.read(4096)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
        shown += screen.read(4096)
    assert b"Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_keeps_its_traceback():
    script = (
        "from specdec_rt.cli import main, make_app\n"
        "def fail(): raise RuntimeError('a bug')\n"
        "main(['fail'], app=make_app({'fail': fail, 'other': fail}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("\nRuntimeError: a bug\n")


def test_importing_the_command_line_imports_no_execution_library():
    """A typing error or --help must not wait for one."""
    script = "import sys, specdec_rt.cli; print([m for m in ('onnxruntime', 'torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
