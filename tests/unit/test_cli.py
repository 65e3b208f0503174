"""The command line: what it writes, what it prints where, and how it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bundles import copy_bundle, edit_manifest
from PIL import Image

import specdec_rt
from specdec_rt.cli import app as cli
from specdec_rt.cli import files as output
from specdec_rt.cli import parse_labels
from specdec_rt.cli.sheet import SheetLayout, draw_sheet
from specdec_rt.errors import OutputError, UsageError

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
def test_labels(text, labels):
    assert parse_labels(text, 10) == labels


def test_labels_of_a_large_bundle():
    assert parse_labels("207,360", 1000) == [207, 360]
    with pytest.raises(UsageError, match=r"no labels were given; the bundle has 1000 classes.*--labels"):
        parse_labels(None, 1000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no label; expected a list such as 0-9 or 1,3-5"),
        ("a", "'a' is no label"),
        ("1,,2", "'' is no label"),
        ("-1", "'-1' is no label"),
        ("1-", "'1-' is no label"),
        ("1.5", "'1.5' is no label"),
        ("1-2-3", "'1-2-3' is no label"),
        ("1\n-2,٣", "'٣' is no label"),
        ("9" * 5000, "is no label"),
        ("5-2", "'5-2' runs backwards; write 2-5"),
        ("10", "labels holds 10; expected 0 to 9"),
        ("0-999999999", "labels holds 999999999; expected 0 to 9"),
    ],
)
def test_labels_that_are_none(text, said):
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


def test_the_table_tells_what_was_drafted_accepted_and_called(run):
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


def test_json_and_arrays(run, tmp_path):
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


def test_exact_json(run):
    code, out, _ = run("generate", "--labels", "4", "--draft", "self", "--json", "--out", "x.png")
    record = json.loads(out)
    assert code == 0
    assert list(record) == JSON_FIELDS
    assert 0 <= record["acceptance_rate"] <= 1
    assert record["tokens_per_round"] == 1
    assert record["rounds"] == record["target_backbone_calls"] == 49
    assert record["draft_lengths"] == {"1": 49}


def test_a_draft_length_that_is_chosen_on_the_way(run):
    code, out, _ = run(
        "generate", "--labels", "4", "--draft", "self", "--draft-length", "auto", "--json", "--out", "x.png"
    )
    record = json.loads(out)
    assert code == 0
    assert set(record["draft_lengths"]) <= {"0", "1"}
    assert sum(record["draft_lengths"].values()) == record["target_backbone_calls"] == 49
    _, _, err = run("generate", "--labels", "4", "--draft", "self", "--draft-length", "auto", "--out", "x.png")
    assert "AR steps drafted" in err


def test_one_picture_per_image(run, tmp_path):
    code, _, err = run("generate", "--labels", "7,2", "--count", "2", "--mode", "draft", "--out-dir", "many")
    assert code == 0
    names = ["00000-7.png", "00001-7.png", "00002-2.png", "00003-2.png"]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
    images = specdec_rt.load().generate([7, 7, 2, 2], mode="draft").images
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / "many" / name), image[:, :, 0])
    assert "wrote many" in err


def test_outputs_go_together_and_replace_older_ones(run, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "kept.txt").write_text("mine")
    (tmp_path / "x.PNG").write_text("old")
    code, _, _ = run("generate", *QUICK, "--out", "x.PNG", "--out-dir", "many", "--tokens", "t.npz")
    assert code == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["many/00000-3.png", "many/kept.txt", "t.npz", "x.PNG"]
    assert pixels("x.PNG").shape == (120, 120)


def test_options_reach_the_request(run, monkeypatch):
    asked = {}

    def generate(_, labels, **arguments):
        asked.update(arguments, labels=list(labels))
        raise UsageError("stop here")

    monkeypatch.setattr(specdec_rt.Pipeline, "generate", generate)
    flags = "--mode paper --draft small --draft-length 3 --draft-steps 9 --tau 2 --prefill 0.1 --guidance 1.5"
    more = "--guidance-schedule constant --temperature 0.9 --ar-steps 49 --seed 8 --batch-size 2 --labels 1-2 --count 2"
    assert run("generate", *flags.split(), *more.split())[0] == 2
    del asked["progress"]
    assert asked == {
        "labels": [1, 1, 2, 2],
        "seed": 8,
        "batch_size": 2,
        "options": specdec_rt.DecodeOptions(
            mode="paper",
            draft="small",
            draft_length=3,
            draft_steps=9,
            tau=2.0,
            prefill=0.1,
            guidance=1.5,
            guidance_schedule="constant",
            temperature=0.9,
            ar_steps=49,
        ),
    }


# --- inspect -------------------------------------------------------------------------------------------


def test_inspect(run, tmp_path):
    code, out, err = run("inspect")
    assert (code, err) == (0, "")
    for words in ("causal", "49 of 16 values", "28 x 28 x 1", "final_std", "draft adapter", "tokens [B,"):
        assert words in out
    assert "computes in" in out
    assert list(tmp_path.iterdir()) == []


def test_inspect_json(run):
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


def test_inspect_tells_why_exact_cannot_work(run, tmp_path):
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
        (("--labels", "x"), "'x' is no label"),
        (("--count", "0"), "count is 0; expected a whole number of at least 1"),
        (("--count", "10000000"), "take --out-dir or --tokens instead"),
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
def test_bad_values(refused, arguments, said):
    assert said in refused("generate", *arguments)


@pytest.mark.parametrize("arguments", [("--tau", "x"), ("--labels",), ("--nothing",), ("--count", "1.5"), ("a", "b")])
def test_bad_usage(run, tmp_path, arguments):
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "")
    assert "Error" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_damaged_bundle(refused, tmp_path):
    folder = copy_bundle(tmp_path / "copy")
    (folder / "target.backbone.onnx").write_bytes(b"")
    assert f"{folder / 'target.backbone.onnx'} has SHA-256" in refused("generate", folder)
    assert f"{folder / 'target.backbone.onnx'} has SHA-256" in refused("inspect", folder, "--json")


def test_a_chain_on_which_exact_cannot_work(refused, tmp_path):
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
def test_places_that_cannot_be_written(refused, tmp_path, monkeypatch, arguments, said):
    """Refused before the work starts."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(specdec_rt.Pipeline, "generate", lambda *_, **__: pytest.fail("the work was started"))
    assert said in refused("generate", *QUICK, *arguments)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("arguments", [("--out", "locked/x.png"), ("--out-dir", "locked"), ("--out-dir", "locked/new")])
def test_folder_without_permission(refused, tmp_path, arguments):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written (Permission denied)" in refused("generate", *QUICK, *arguments)


def test_a_file_system_that_refuses(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.Path, "open", refuse)
    with pytest.raises(OutputError, match=r"x.png cannot be written \(Permission denied\); choose another place"):
        output.check_file(output.Path("x.png"), ".png")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_nothing_half_written_remains(tmp_path, error):
    def fail(file):
        file.write(b"half")
        raise error

    old, folder = tmp_path / "old.npz", tmp_path / "new"
    old.write_text("old")
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        output.write_together(
            {folder / "0.png": lambda file: file.write(b"whole"), old: fail, tmp_path / "later.npz": fail},
            folder=folder,
        )
    assert list(tmp_path.rglob("*")) == [old]
    assert old.read_text() == "old"


# --- the process ---------------------------------------------------------------------------------------


def test_interrupt_ends_with_130_and_leaves_nothing(tmp_path):
    """The interrupt comes once decoding has begun: a helper that starts the CLI says so on stdout."""
    script = (
        "import signal, sys, specdec_rt.cli as cli, specdec_rt.pipeline as pipeline\n"
        # As on a terminal, also where the tests run in the background of a shell, which ignores interrupts there.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run = pipeline.Decoder.run\n"
        "def told(self):\n"
        "    print('started', flush=True)\n"
        "    return run(self)\n"
        "pipeline.Decoder.run = told\n"
        "sys.argv = ['specdec-rt', 'generate', '--mode', 'target', '--count', '100', '--out-dir', 'many']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "started\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(specdec_rt.Pipeline, "generate", fail)
    monkeypatch.setattr(sys, "argv", ["specdec-rt", "generate"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_the_module_is_light():
    """A typing error or --help must not wait for an execution library."""
    script = "import sys, specdec_rt.cli; print([m for m in ('onnxruntime', 'torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 2.0, True), (True, 0.5, False), (False, 9.0, False)])
def test_a_bar_only_for_long_work_on_a_terminal(monkeypatch, terminal, seconds, shown):
    started = []
    clock = iter([0.0, seconds])
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cli.Progress, "start", lambda _: started.append(True))
    with cli._progress_bar() as tell:
        if tell is not None:
            tell(1, 2)
    assert bool(started) == shown
