"""Durable files: whole or absent, and every change is noticed."""

import os
import random
import resource
import shutil
import stat
from pathlib import Path

import pytest
import torch

from sae_train.files import (
    FORMAT,
    MANIFEST,
    CorruptFile,
    CorruptFolder,
    FutureFormat,
    committed_folder,
    digest,
    read_json,
    read_tensors,
    remove_leftovers,
    verify,
    write_json,
    write_tensors,
)


def make_folder(target: Path) -> Path:
    with committed_folder(target, "test", {"step": 7}) as temp:
        write_tensors(temp / "rows.safetensors", {"x": torch.arange(600, dtype=torch.float32)})
        write_json(temp / "facts.json", {"a": [1, 2.5, None, "é"]})
    return target


def test_a_committed_folder_verifies_and_gives_back_what_was_written(tmp_path):
    folder = make_folder(tmp_path / "step-1")
    manifest = verify(folder, "test")
    assert manifest["meta"] == {"step": 7}
    assert set(manifest["files"]) == {"rows.safetensors", "facts.json"}
    assert torch.equal(read_tensors(folder / "rows.safetensors")["x"], torch.arange(600.0))
    assert read_json(folder / "facts.json") == {"a": [1, 2.5, None, "é"]}
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_every_one_of_200_random_bit_flips_is_detected_in_each_file(tmp_path):
    folder = make_folder(tmp_path / "step-1")
    rng = random.Random(0)
    for name in ("rows.safetensors", "facts.json", MANIFEST):
        good = (folder / name).read_bytes()
        for _ in range(200):
            bad = bytearray(good)
            position = rng.randrange(len(bad))
            bad[position] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(bad)
            with pytest.raises(CorruptFolder):
                verify(folder)
        (folder / name).write_bytes(good)
        verify(folder)


def truncated(folder: Path) -> None:
    os.truncate(folder / "rows.safetensors", 100)


def zero_tail(folder: Path) -> None:
    size = (folder / "rows.safetensors").stat().st_size
    os.truncate(folder / "rows.safetensors", size - 64)
    os.truncate(folder / "rows.safetensors", size)


def swapped(folder: Path) -> None:
    other = folder.parent / "other"
    with committed_folder(other, "test", {"step": 8}) as temp:
        write_tensors(temp / "rows.safetensors", {"x": torch.arange(600, dtype=torch.float32) + 1})
        write_json(temp / "facts.json", {})
    shutil.copy(other / "rows.safetensors", folder / "rows.safetensors")


def linked(folder: Path) -> None:
    (folder / "rows.safetensors").rename(folder.parent / "elsewhere")
    (folder / "rows.safetensors").symlink_to(folder.parent / "elsewhere")


FAULTS = {
    "bytes": truncated,
    "changed": zero_tail,
    "changed ": swapped,
    "not a regular file": linked,
    "'facts.json' is missing": lambda folder: (folder / "facts.json").unlink(),
    f"{MANIFEST} is missing": lambda folder: (folder / MANIFEST).unlink(),
    "'extra' is not in the manifest": lambda folder: (folder / "extra").write_text("x"),
    "not valid JSON": lambda folder: (folder / MANIFEST).write_text("{"),
    "no format version": lambda folder: (folder / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_each_kind_of_damage_is_refused_with_its_reason(tmp_path, reason):
    folder = make_folder(tmp_path / "step-1")
    FAULTS[reason](folder)
    with pytest.raises(CorruptFolder, match=reason.strip()):
        verify(folder)


def test_a_folder_of_another_kind_or_behind_a_link_is_refused(tmp_path):
    folder = make_folder(tmp_path / "step-1")
    with pytest.raises(CorruptFolder, match="kind 'test', not 'checkpoint'"):
        verify(folder, "checkpoint")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CorruptFolder, match="not a folder"):
        verify(tmp_path / "link")


def test_a_future_format_is_refused_naming_both_versions(tmp_path):
    folder = make_folder(tmp_path / "step-1")
    manifest = (folder / MANIFEST).read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 41}')
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(FutureFormat, match=f"version {FORMAT + 41}.* {FORMAT}"):
        verify(folder)


def test_an_existing_target_is_never_written_into_and_a_failure_leaves_nothing(tmp_path):
    folder = make_folder(tmp_path / "step-1")
    before = digest(folder / MANIFEST)
    with pytest.raises(FileExistsError):
        make_folder(folder)
    with pytest.raises(TypeError), committed_folder(tmp_path / "step-2", "test", {}) as temp:
        write_json(temp / "half", object())
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert digest(folder / MANIFEST) == before


def test_a_folder_that_is_no_longer_ours_when_all_is_written_gets_no_name(tmp_path):
    seen = []

    def lost() -> None:
        (temp,) = tmp_path.iterdir()
        seen.extend(sorted(p.name for p in temp.iterdir()))
        raise PermissionError("taken over")

    with (
        pytest.raises(PermissionError, match="taken over"),
        committed_folder(tmp_path / "step-1", "test", {}, lost) as temp,
    ):
        write_json(temp / "a.json", {})
    assert seen == [MANIFEST, "a.json"], "asked last, when nothing is left to do but the rename"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_parent_was_moved_away_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError), committed_folder(tmp_path / "gone" / "step-1", "test", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_share_memory_or_are_not_contiguous_are_stored_whole(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "b": base,
        "t": base.T,
        "part": base[1],
        "scalar": torch.tensor(3),
        "empty": base[:0],
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        make_folder(tmp_path / "made")
    finally:
        os.umask(old)
    made = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "made").iterdir()}
    assert made == dict.fromkeys(["rows.safetensors", "facts.json", MANIFEST], 0o666 & ~umask)
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o777 & ~umask


BAD_JSON = {
    "key is given twice": b'{"a": 1, "a": 2}',
    "NaN is not a JSON number": b'{"a": NaN}',
    "-Infinity is not a JSON number": b"[-Infinity]",
    "not valid JSON": b"\xff\xfe",
    "recursion": b"[" * 100_000,
    "Exceeds the limit": b"9" * 10_000,
    "at most 20000": b" " * 200_001,
}


@pytest.mark.parametrize("reason", BAD_JSON)
def test_hostile_json_is_refused(tmp_path, reason):
    (tmp_path / "x.json").write_bytes(BAD_JSON[reason])
    with pytest.raises(CorruptFile, match=reason):
        read_json(tmp_path / "x.json", max_bytes=200_000)


def test_a_fifo_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(CorruptFile, match="not a regular file"):
        read_json(tmp_path / "x")
    with pytest.raises(CorruptFile, match="not a regular file"):
        read_tensors(tmp_path / "x")


def test_json_with_nan_is_not_written_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_beyond_the_size_limit_fails_loudly_and_leaves_the_old_one(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(4)})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(OSError, match="large"):
            write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["x"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_leftovers_are_removed_without_following_links(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    inside = tmp_path / "inside"
    (inside / ".tmp-step-1-ab").mkdir(parents=True)
    (inside / ".tmp-x.json-ab").write_text("half")
    (inside / ".tmp-link").symlink_to(precious)
    (inside / "step-1").mkdir()
    remove_leftovers(inside)
    assert [p.name for p in inside.iterdir()] == ["step-1"]
    assert (precious / "x").exists()
