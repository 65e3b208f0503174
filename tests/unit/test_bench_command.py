"""`specdec-rt bench`: what it measures, what it predicts, and how it refuses."""

import json

import pytest

DIGITS = ["digits", "--batches", "1", "--threads", "1", "--json"]


def test_it_measures_a_mode(run):
    code, out, _ = run("bench", *DIGITS, "--modes", "target", "--requests", "1", "--warmup", "0")

    (row,) = json.loads(out)["rows"]
    assert code == 0
    assert (row["mode"], row["exact"], len(row["seconds"])) == ("target", True, 1)
    assert 0 < row["profile"]["host_share"] < 1


def test_it_predicts_more_images_for_a_better_draft(run):
    words = [
        "--predict",
        "--acceptance",
        "0.5,0.9",
        "--draft-lengths",
        "2",
        "--draft-cost",
        "0.1",
        "--draft-steps",
        "8",
    ]

    code, out, _ = run("bench", *DIGITS, *words)

    alone, worse, better = json.loads(out)["rows"]
    assert code == 0
    assert alone["against_target"] == 1
    assert worse["images_per_second"] < better["images_per_second"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "one"], "batches is 'one'"),
        (["--modes", "fast"], "modes holds 'fast'"),
        (["--draft-cost", "0.1"], "add --predict"),
        (["--predict", "--acceptance", "1.5"], "acceptance holds 1.5"),
    ],
)
def test_what_it_cannot_do_is_named(run, words, said):
    code, _, err = run("bench", "digits", *words)

    assert code == 2
    assert said in err
