"""The engine cache: what it gives out, and what it refuses."""

import hashlib
import json
import logging
import os
import threading

import pytest

from specdec_rt.backends.tensorrt_builder import ShapeProfile
from specdec_rt.build.cache import EngineCache
from specdec_rt.build.engine_record import EngineRecord, canonical_json, engine_key
from specdec_rt.build.trust import Signer
from specdec_rt.errors import OutputError
from specdec_rt.manifest import Binding

PLAN = b"a serialised engine" * 100


def record(name="digits", **fields):
    return EngineRecord(
        bundle=name,
        graph="target.time_embedding",
        precision="fp16",
        backend="tensorrt-rtx",
        library="1.7",
        gpu=None,
        inputs=(Binding(name="timestep", dtype="int64", shape=("n",)),),
        outputs=(Binding(name="time_table", dtype="float32", shape=("n", 256)),),
        profiles={"timestep": ShapeProfile((1,), (46,), (46,))},
        fields={"backend": "tensorrt-rtx", **fields},
        build_seconds=1.5,
    )


def put(cache, plan=PLAN, **fields):
    """Store an engine that was built from `fields`; returns its key."""
    made = record(**fields)
    key = engine_key(made.fields)
    cache.store(key, plan, made)
    return key


@pytest.fixture
def secret(tmp_path):
    """The file that holds this machine's secret."""
    return tmp_path / "state" / "secret"


@pytest.fixture
def signer(secret):
    return Signer(secret)


@pytest.fixture
def cache(tmp_path, signer):
    return EngineCache(tmp_path / "cache", signer=signer)


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir() if not path.name.endswith(".lock"))


# --- what goes in comes out --------------------------------------------------------------------------


def test_a_key_is_of_everything_and_of_no_order():
    fields = {"graph": "ab", "profiles": {"x": [1, 2]}, "gpu": None}
    assert engine_key(fields) == engine_key(dict(reversed(fields.items())))
    assert len({engine_key(fields), engine_key({**fields, "gpu": "A"}), engine_key({**fields, "profiles": {}})}) == 3


def test_a_plan_comes_back_with_its_record(cache, secret):
    key = put(cache, level=3)
    again = EngineCache(cache.folder, signer=Signer(secret))
    assert again.read(key) == PLAN
    found = again.lookup(key)
    assert (found.key, found.path) == (key, cache.folder / f"{key}.plan")
    assert found.record.profiles == {"timestep": ShapeProfile((1,), (46,), (46,))}
    assert found.record.fields == {"backend": "tensorrt-rtx", "level": 3}
    assert (found.record.plan_bytes, found.record.plan_sha256) == (len(PLAN), hashlib.sha256(PLAN).hexdigest())
    assert found.record.created.endswith("+00:00")
    assert names(cache) == [f"{key}.json", f"{key}.plan"]


def test_an_unknown_key_is_no_engine_and_no_news(cache, caplog):
    assert cache.read("0" * 64) is None
    assert cache.lookup("0" * 64) is None
    assert caplog.records == []


def test_a_cache_that_was_never_used(tmp_path):
    cache = EngineCache(tmp_path / "none")
    assert (cache.entries(), cache.size_bytes, cache.clear()) == ([], 0, 0)
    assert not cache.folder.exists()


def test_an_engine_takes_the_place_of_an_older_one(cache):
    key = put(cache)
    put(cache, b"newer")
    assert cache.read(key) == b"newer"
    assert len(cache.entries()) == 1


# --- what is refused ---------------------------------------------------------------------------------


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resign(signer, key, content):
    """Whoever has the secret may sign."""
    content["signature"] = signer.sign(canonical_json([key, content["record"]])).hex()


DAMAGE = {
    "tampered plan": (lambda plan, _: flip(plan), "its plan is not the one that was recorded"),
    "truncated plan": (lambda plan, _: plan.write_bytes(PLAN[:-1]), "its plan is missing or was cut off"),
    "longer plan": (lambda plan, _: plan.write_bytes(PLAN + b"!"), "its plan is missing or was cut off"),
    "missing plan": (lambda plan, _: plan.unlink(), "its plan is missing or was cut off"),
    "missing record": (lambda _, json: json.unlink(), "it has no record"),
    "empty record": (lambda _, json: json.write_text(""), "its record cannot be read"),
    "record of another kind": (lambda _, json: json.write_text("[1]"), "its record cannot be read"),
    "record that is no JSON number": (
        lambda _, path: edit(path, lambda found: found["record"].update(build_seconds=float("nan"))),
        "its record cannot be read",
    ),
    "altered record": (
        lambda _, path: edit(path, lambda found: found["record"].update(precision="fp32")),
        "its record was altered, or is that of another machine",
    ),
    "altered record and plan": (
        lambda plan, path: (
            plan.write_bytes(b"evil"),
            edit(
                path,
                lambda found: found["record"].update(plan_bytes=4, plan_sha256=hashlib.sha256(b"evil").hexdigest()),
            ),
        ),
        "its record was altered, or is that of another machine",
    ),
    "no signature": (lambda _, path: edit(path, lambda found: found.pop("signature")), "its record cannot be read"),
    "short signature": (
        lambda _, path: edit(path, lambda found: found.update(signature="00")),
        "its record was altered, or is that of another machine",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_refused_and_removed(cache, caplog, damage):
    hurt, said = DAMAGE[damage]
    key, other = put(cache), put(cache, level=4)
    hurt(cache.folder / f"{key}.plan", cache.folder / f"{key}.json")
    assert cache.read(key) is None
    assert said in caplog.text
    foreign = "another machine" in said  # it may be good for somebody else
    assert ("it is removed" in caplog.text) == (not foreign)
    assert (names(cache) == [f"{other}.json", f"{other}.plan"]) == (not foreign)
    assert cache.read(key) is None
    assert cache.read(other) == PLAN
    assert cache.read(put(cache)) == PLAN  # built anew


def test_another_machines_engines_are_refused(cache, tmp_path, caplog):
    key = put(cache)
    foreign = EngineCache(cache.folder, signer=Signer(tmp_path / "other" / "secret"))
    assert foreign.entries() == []
    assert foreign.lookup(key) is None
    assert "another machine or user" in caplog.text
    assert cache.read(key) == PLAN  # a shared folder's engines are still their owner's


def test_an_engine_under_another_engines_name_is_refused(cache, caplog):
    key, other = put(cache), put(cache, b"slower", level=0)
    for suffix in ("plan", "json"):
        (cache.folder / f"{other}.{suffix}").replace(cache.folder / f"{key}.{suffix}")
    assert cache.read(key) is None
    assert "its record was altered" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.update(schema_version=2),
        lambda found: found.update(surplus=1),
        lambda found: found["fields"].update(level=9),
    ],
)
def test_a_record_of_another_release_is_refused(cache, signer, caplog, change):
    key = put(cache)

    def altered(found):
        change(found["record"])
        resign(signer, key, found)

    edit(cache.folder / f"{key}.json", altered)
    assert cache.read(key) is None
    assert "its record is that of another release" in caplog.text


# --- size and leftovers ------------------------------------------------------------------------------


def age(cache, *keys):
    """Engines that were last used in this order, long ago."""
    for index, key in enumerate(keys):
        os.utime(cache.folder / f"{key}.plan", (index + 1, index + 1))


def test_the_least_recently_used_go(cache):
    keys = [put(cache, level=level) for level in range(3)]
    age(cache, *keys)
    assert cache.read(keys[0]) == PLAN
    assert [entry.key for entry in cache.entries()] == [keys[0], keys[2], keys[1]]
    cache.limit_bytes = 3 * len(PLAN)
    new = put(cache, level=3)
    assert sorted(entry.key for entry in cache.entries()) == sorted([keys[0], keys[2], new])
    assert cache.size_bytes == 3 * len(PLAN)
    assert len(names(cache)) == 6


def test_an_engine_larger_than_the_cache_stays_alone(cache):
    put(cache)
    cache.limit_bytes = 1
    key = put(cache, level=1)
    assert [entry.key for entry in cache.entries()] == [key]


def test_clear_removes_engines_and_nothing_else(cache):
    put(cache)
    cache.store_timing("1" * 64, b"times")
    for name in ("mine.plan", "manifest.json", ".mine.part"):
        (cache.folder / name).write_text("mine")
    assert cache.clear() == 1
    assert names(cache) == [".mine.part", "manifest.json", "mine.plan"]
    assert cache.entries() == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_remains(cache, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)  # the disk's part of writing: nothing else fails as it does
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        put(cache)
    assert names(cache) == []
    if isinstance(error, OSError):
        assert "cannot be used (No space left on device); choose another folder: --cache DIR" in str(caught.value)
    monkeypatch.undo()
    assert cache.read(put(cache)) == PLAN


def test_what_a_killed_process_left_is_removed(cache):
    key = put(cache)
    (cache.folder / f".{'2' * 64}.plan.part").write_bytes(b"half")
    put(cache)
    assert names(cache) == [f"{key}.json", f"{key}.plan"]


def test_a_folder_that_is_none(tmp_path, signer):
    (tmp_path / "file").write_text("mine")
    cache = EngineCache(tmp_path / "file", signer=signer)
    for use in (lambda: put(cache), lambda: cache.read("0" * 64), lambda: cache.building().__enter__()):
        with pytest.raises(OutputError, match=r"engine cache .*file cannot be used \(.*--cache DIR"):
            use()


# --- timing caches -----------------------------------------------------------------------------------


def test_timing_caches_are_trusted_like_engines(cache, tmp_path, caplog):
    key = "3" * 64
    assert cache.read_timing(key) == b""
    cache.store_timing(key, b"times")
    assert cache.read_timing(key) == b"times"
    foreign = EngineCache(cache.folder, signer=Signer(tmp_path / "other"))
    assert foreign.read_timing(key) == b""
    assert "it is not used" in caplog.text
    assert names(cache) == []


# --- the secret --------------------------------------------------------------------------------------


def test_the_secret_is_its_owners_alone(signer, secret):
    signature = signer.sign(b"content")
    assert secret.stat().st_size == 32
    assert os.name != "posix" or secret.stat().st_mode & 0o777 == 0o600
    assert Signer(secret).agrees(b"content", signature)
    assert not signer.agrees(b"content!", signature)


def test_a_secret_that_others_could_read_counts_no_more(signer, secret, caplog):
    signature = signer.sign(b"content")
    secret.chmod(0o644)
    assert not Signer(secret).agrees(b"content", signature)
    assert "could be read by others" in caplog.text
    assert secret.stat().st_mode & 0o777 == 0o600


def test_a_damaged_secret_is_made_anew(signer, secret, caplog):
    signer.sign(b"content")
    secret.write_bytes(b"short")
    Signer(secret).sign(b"content")
    assert secret.stat().st_size == 32
    assert caplog.records[0].levelno == logging.WARNING


def test_processes_that_start_together_share_one_secret(tmp_path):
    signatures = []
    threads = [
        threading.Thread(target=lambda: signatures.append(Signer(tmp_path / "secret").sign(b"content")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(signatures) == 8
    assert len(set(signatures)) == 1


def test_a_secret_that_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="the secret that signs engines, cannot be read or made"):
        Signer(tmp_path / "file" / "secret").sign(b"content")
