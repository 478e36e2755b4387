"""
Proves that checkpoints are whole or absent: damage anywhere is seen, the newest good one is found, a failed write leaves
the older ones, and a hostile file runs no code.
"""
import pickle
import resource
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

from checkpoint import checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint

STATE = {"model": {"w": torch.arange(5000.0)}, "config": {"n_layer": 1}, "tokenizer": "bytes"}


def test_round_trip_and_the_last_few_are_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {**STATE, "model": {"w": torch.full((3,), float(step))}}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["ckpt_0000004.pt", "ckpt_0000005.pt"]
    path, state = newest_checkpoint(tmp_path)
    assert path.name == "ckpt_0000005.pt" and state["step"] == 5 and state["model"]["w"].tolist() == [5.0] * 3
    assert not list(tmp_path.glob("*.tmp"))


def test_damage_is_seen_wherever_it_is(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE, keep=2)
    whole = path.read_bytes()
    tensor_bytes = whole.index(torch.arange(5000.0).numpy().tobytes()[:64])
    for content in (b"", whole[:100], whole[:-1], whole[: len(whole) // 2], b"x" * 100,
                    whole[:tensor_bytes + 40] + b"\xff" + whole[tensor_bytes + 41:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="ckpt_0000001.pt cannot be used") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    assert load_checkpoint(path)["step"] == 1


def test_newest_good_one_is_found(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, STATE, keep=3)
    (tmp_path / "ckpt_0000003.pt").write_bytes(b"half")
    (tmp_path / "ckpt_0000004.tmp").write_bytes(b"never renamed")
    said = []
    assert newest_checkpoint(tmp_path, said.append)[1]["step"] == 2
    assert len(said) == 1 and "ckpt_0000003.pt cannot be used" in said[0]
    for path in checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 3 checkpoints is whole"):
        newest_checkpoint(tmp_path, said.append)
    assert newest_checkpoint(tmp_path / "elsewhere") is None


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_hostile_file_runs_no_code(tmp_path):
    marker = tmp_path / "executed"
    save_checkpoint(tmp_path, 1, {**STATE, "model": Hostile(str(marker))}, keep=1)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(str(marker))))
    for path in (tmp_path / "ckpt_0000001.pt", tmp_path / "plain.pt"):
        with pytest.raises(ValueError, match="cannot be used"):
            load_checkpoint(path)
    assert not marker.exists()
    torch.load(tmp_path / "ckpt_0000001.pt", weights_only=False)  # the file is hostile indeed
    assert marker.exists()


def test_other_files_are_not_checkpoints(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pt")
    torch.save({"format": 2, "step": 3}, tmp_path / "b.pt")
    torch.save([1], tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("x", "y")
    for name, message in (("a", "not a checkpoint of format 2"), ("b", "it has no 'model'"), ("c", "not a checkpoint"), ("d", "")):
        with pytest.raises(ValueError, match=f"{name}.pt cannot be used: .*{message}"):
            load_checkpoint(tmp_path / f"{name}.pt")


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the middle, for real."""
    save_checkpoint(tmp_path, 1, STATE, keep=1)
    script = ("import sys, torch; from checkpoint import save_checkpoint; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "save_checkpoint(sys.argv[1], 2, {'model': {'w': torch.zeros(10**6)}, 'config': {}, 'tokenizer': 'x'}, keep=1)")
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 5, 10 ** 5)))
    assert done.returncode != 0 and "OSError: the checkpoint of step 2 cannot be written to" in done.stderr
    assert "File too large" in done.stderr and "the older checkpoints stand" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt_0000001.pt"]
    assert newest_checkpoint(tmp_path)[1]["step"] == 1
