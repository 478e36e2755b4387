"""Proves that sample.py continues a prompt from a checkpoint made by train.py, the same for the same seed, as whole characters."""
import torch
from conftest import run

from data import get_encoding
from sample import load_model, stream_text


def test_sample(undisturbed):
    out, _ = undisturbed
    args = [f"--out_dir={out}", "--prompt=1 + 2 = ", "--max_new_tokens=20", "--num_samples=2", "--seed=3"]
    first, second = (run("sample.py", *args).stdout for _ in range(2))
    assert first == second and first.count("1 + 2 = ") == 2
    assert "--- sample 1 after 12 steps, seed 3 ---" in first


def test_characters_of_several_tokens_come_whole(capsys):
    class Scripted(torch.nn.Module):  # says γ⊙ byte by byte, then a byte that is no character, an id beyond the vocabulary, the end
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def generate(self, idx, max_new_tokens, *args):
            for token in [*"γ⊙".encode(), 0xFF, 300, 256, 65]:
                yield torch.tensor([[token]])

    stream_text(Scripted(), get_encoding("bytes"), "x", 100)
    assert capsys.readouterr().out == "xγ⊙\ufffd\ufffd\n"


def test_errors(tmp_path):
    done = run("sample.py", f"--out_dir={tmp_path}", check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: no checkpoint in") and done.stderr.count("\n") == 1
    done = run("sample.py", "--temperature=-1", check=False)
    assert "cannot be negative" in done.stderr


def test_model_comes_back_as_it_was(undisturbed):
    model, encoding, step = load_model(undisturbed[0])
    assert step == 12 and encoding.name == "bytes" and not model.training
