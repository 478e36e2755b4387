"""
Proves that sample.py continues a prompt from a checkpoint made by train.py, the same for the same
seed, as whole characters, on any terminal, and that data without a known tokenizer are shown as
token ids.
"""
import io
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from lib.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from lib.data import get_encoding
from sample import load_model, stream_text


def test_sample(undisturbed, capsys):
    out, _ = undisturbed
    args = [f"--out_dir={out}", "--prompt=1 + 2 = ", "--max_new_tokens=20", "--num_samples=2",
            "--seed=3"]
    sample.main(args)
    first = capsys.readouterr().out
    sample.main(args)
    assert first == capsys.readouterr().out and first.count("1 + 2 = ") == 2
    model, encoding, step = load_model(out)
    assert step == 12 and encoding.name == "bytes" and not model.training
    assert "--- sample 1 after 12 steps, seed 3 ---" in first


def test_a_checkpoint_of_other_code(undisturbed, tmp_path):
    """A fork's new key, say, whose default need not be what the run was trained with."""
    state = load_checkpoint(newest_checkpoint(undisturbed[0])[0])
    del state["config"]["n_kv_head"], state["format"], state["step"]
    save_checkpoint(tmp_path, 12, state, keep=1)
    with pytest.raises(ValueError, match="ckpt_0000012.pt was written by .* key n_kv_head: use"):
        load_model(tmp_path)


class Scripted(torch.nn.Module):
    """In place of a model: its logits leave no choice but the tokens that it was told."""

    def __init__(self, tokens, vocab_size=400):
        super().__init__()
        self.anchor, self.tokens = torch.nn.Parameter(torch.zeros(1)), iter(tokens)
        self.config, self.layers = SimpleNamespace(vocab_size=vocab_size, block_size=999), []
        self.read = []

    def forward(self, idx, caches):
        self.read.append(idx[0].tolist())
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[..., next(self.tokens)] = 1e9
        return logits, None


def test_characters_of_several_tokens_come_whole(capsys):
    """γ⊙ byte by byte, then a byte that is no character, an id beyond the vocabulary, the end."""
    stream_text(Scripted([*"γ⊙".encode(), 0xFF, 300, 256, 65]), get_encoding("bytes"), "x", 100)
    assert capsys.readouterr().out == "xγ⊙\ufffd\ufffd\n"


@pytest.mark.parametrize("terminal, shown", [
    ("ascii", b"x? ? a\n"), ("latin-1", b"x\xe9 ? a\n"), ("utf-8", "xé γ a\n".encode())])
def test_a_terminal_that_is_not_utf8_ends_no_run(monkeypatch, terminal, shown):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=terminal))
    stream_text(Scripted([*" γ a".encode()]), get_encoding("bytes"), "xé", 5)
    assert screen.getvalue() == shown


def test_without_a_tokenizer_the_text_is_token_ids(capsys):
    """nanoGPT's character data: 65 ids, of which 0 is a character like any other."""
    for prompt, ids, shown in (("\n", [0], "\n 5 0 64"), ("17 4", [17, 4], "17 4 5 0 64")):
        model = Scripted([5, 0, 64], vocab_size=65)
        stream_text(model, get_encoding("ids"), prompt, 3)
        assert model.read[0] == ids
        unknown = "(token ids: the tokenizer of the training data is not known)"
        assert capsys.readouterr().out == f"{unknown}\n{shown}\n"
    for prompt, message in (("To be", "give token ids as the prompt"), ("-1", "token id -1"),
                            ("1 65", "65, and the model knows 0 to 64: .* another tokenizer")):
        with pytest.raises(ValueError, match=message) as error:
            stream_text(model, get_encoding("ids"), prompt, 100)
        assert "\n" not in str(error.value)


def test_errors_are_one_line_and_ctrl_c_is_none(undisturbed, tmp_path, monkeypatch, capsys):
    out = f"--out_dir={undisturbed[0]}"
    for args, message in (([f"--out_dir={tmp_path}"], "no checkpoint in"),
                          (["--temperature=-1"], ".*cannot be negative"),
                          (["--num_samples=-2"], ".*cannot be negative"),
                          ([out, "--device=foo"], ""), ([out, "--device=cuda:99"], "")):
        with pytest.raises(SystemExit, match=f"^error: {message}") as error:
            sample.main(args)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(sample, "stream_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        sample.main([out, "--device=cpu"])
    assert end.value.code == 130 and capsys.readouterr().err == "\n"
