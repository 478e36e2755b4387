"""
Proves the way in: a Llama, Mistral, Qwen3, Gemma 3 or Mixtral that transformers made with random weights and random γ becomes our model
with the same logits, for any strategy that is the same function at γ = 1; a run starts from it with its loss; and what has no
counterpart is refused by its name. Needs the optional package transformers.
"""
import json

import pytest
import torch
from conftest import UNIFIED, read_log, tiny_batch, trained

transformers = pytest.importorskip("transformers", minversion="5", reason="needs the optional package transformers, 5 or later")
pytest.importorskip("safetensors", reason="needs the optional package safetensors")

from hf import export  # noqa: E402
from hf.from_hf import read_model, same_logits  # noqa: E402
from lib.data import Dataset, get_encoding  # noqa: E402
from norms import named_scale_vectors  # noqa: E402

SHAPE = dict(vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=16, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
             bos_token_id=None, eos_token_id=256, pad_token_id=None, tie_word_embeddings=False, initializer_range=0.2)
KINDS = {
    "Llama": {}, "Llama, tied": {"tie_word_embeddings": True}, "Mistral": {"sliding_window": None}, "Qwen3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Gemma3": {"hidden_activation": "silu", "query_pre_attn_scalar": 5, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True,
               "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), SHAPE["rope_parameters"])},
}


def theirs_on_disk(kind, folder, ones=False, **keys):
    """Save a model of transformers' with random weights, and random γ unless `ones`. Returns it."""
    name = kind.split(",")[0]
    make = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(make(**{**SHAPE, **KINDS[kind], **keys})).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "norm" in key and not ones:
                p += 0.4 * torch.randn(p.shape)
    theirs.save_pretrained(folder)
    return theirs


STRATEGIES = [{}, {"scale_placement": "dual", "scale_reparam": "exponential"}, {"scale_placement": "after", "scale_heterogeneous": True},
              {"scale_heterogeneous": True, "scale_reparam": "original"}, {"scale_reparam": "zero_centered", "scale_placement": "dual"}]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_function(kind, tmp_path):
    """Whatever the strategy, the logits are the original's, and every γ around a map starts at 1."""
    theirs, idx = theirs_on_disk(kind, tmp_path / "hf"), tiny_batch(vocab=261)[0]
    for keys in STRATEGIES:
        if kind == "Gemma3" and keys.get("scale_reparam") == "exponential":
            with torch.no_grad():  # e^β e^(α - mean α) is positive
                for key, p in theirs.named_parameters():
                    if "norm" in key:
                        p.abs_()
            theirs.save_pretrained(tmp_path / "hf")
        model, _ = read_model(tmp_path / "hf", keys)
        with torch.no_grad():
            torch.testing.assert_close(model(idx)[0], theirs(idx).logits, rtol=0, atol=2e-5)
        for name, scale in named_scale_vectors(model):
            assert ".scale_" not in f".{name}" or torch.equal(scale(), torch.ones(scale.shape)), name
        assert not model.config.tie_embeddings  # γ of the final norm went into the head


def test_tied_head_stays_tied(tmp_path):
    theirs = theirs_on_disk("Llama, tied", tmp_path / "hf", ones=True)
    model, _ = read_model(tmp_path / "hf")
    assert model.config.tie_embeddings and same_logits(model, theirs) < 1e-5


def test_qk_norm_becomes_dnp(tmp_path):
    """A strategy with DNP on q and k takes over the Q/K-norm of a Qwen3; with DNP elsewhere the function is another, and it says so."""
    theirs = theirs_on_disk("Qwen3", tmp_path / "hf")
    model, _ = read_model(tmp_path / "hf", {"scale_placement": "dual_norm", "scale_placement_on": "q,k", "scale_reparam": "original"})
    assert not model.config.qk_norm and same_logits(model, theirs) < 2e-5
    model, _ = read_model(tmp_path / "hf", UNIFIED)
    with pytest.raises(ValueError, match="not the same function"):
        same_logits(model, theirs)


def test_there_and_back(tmp_path):
    """Theirs to ours to theirs: the class it was, and its logits."""
    for kind in ("Llama", "Qwen3", "Mixtral"):
        theirs = theirs_on_disk(kind, tmp_path / kind)
        model, _ = read_model(tmp_path / kind, {"scale_placement": "dual"})
        again, name, _ = export.transformers_model(model, {})
        idx = tiny_batch(vocab=261)[0]
        with torch.no_grad():
            torch.testing.assert_close(again(idx).logits, theirs(idx).logits, rtol=0, atol=1e-5)
        assert name == type(theirs).__name__


# ---------------------------------------------------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("kind, change, line", [
    ("Llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
    ("Gemma3", {"hidden_activation": "gelu_pytorch_tanh"}, "activation 'gelu_pytorch_tanh'"),
    ("Llama", {"attention_bias": True}, "attention_bias=True"), ("Llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("Llama", {"head_dim": 16}, "head_dim=16 x 4 heads is not hidden_size=32"),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}, "rope_type='linear'"),
    ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "sliding_window=8"),
    ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}, "rope_theta differs between layers"),
    ("Gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"), ("Mistral", {"sliding_window": 8}, "sliding_window=8"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_refused_by_name(kind, change, line, tmp_path):
    theirs_on_disk(kind, tmp_path / "hf", **change)
    with pytest.raises(ValueError, match=line):
        read_model(tmp_path / "hf")


def test_damaged_folders(tmp_path):
    theirs_on_disk("Llama", tmp_path / "hf")
    with pytest.raises(ValueError, match="block_size=32 is more than the checkpoint's"):
        read_model(tmp_path / "hf", {"block_size": 32})
    with pytest.raises(ValueError, match="holds no config.json"):
        read_model(tmp_path / "nothing")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="missing keys"):
        read_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="unexpected keys"):
        read_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(ValueError, match="model_type is 'gpt_neox'"):
        read_model(tmp_path / "hf")


def test_vectors_that_cannot_be_kept(tmp_path):
    """Q/K-norm's γ cannot be absorbed: a strategy that has no vector there, or one that must be positive, is refused."""
    theirs_on_disk("Qwen3", tmp_path / "hf")
    with pytest.raises(ValueError, match="the strategy has no vector there"):
        read_model(tmp_path / "hf", {"scale_vectors": False})
    with pytest.raises(ValueError, match="names only q"):
        read_model(tmp_path / "hf", {"scale_placement": "dual_norm", "scale_placement_on": "q"})
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "hf")
    theirs.model.layers[0].self_attn.q_norm.weight.data[0] = -1.0
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="not positive"):
        read_model(tmp_path / "hf", {"scale_reparam": "exponential"})


# ---------------------------------------------------------------------------------------------------------------------
# a run that starts from it

@torch.no_grad()
def their_loss(theirs, dataset, block_size):
    """Mean cross-entropy over all validation windows of 8 at most, by transformers alone."""
    val = Dataset(dataset, block_size).val
    count = min(len(val), 8)
    x, y = (torch.from_numpy(a.copy()) for a in val[[i * len(val) // count for i in range(count)]])
    return torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_run_starts_from_it(kind, dataset, tmp_path):
    """train.py resumes the folder at step 0 with the original's loss, and learns."""
    theirs = theirs_on_disk(kind, tmp_path / "hf")
    export.write_tokenizer(get_encoding("bytes"), tmp_path / "hf", 16)
    argv = ["--scale_placement=dual", "--scale_reparam=original", "--scale_weight_decay=input_norm", f"--dataset={dataset}", "--device=cpu",
            "--batch_size=4", "--max_iters=12", "--warmup_iters=2", "--learning_rate=1e-2", "--eval_interval=12", "--eval_windows=8"]
    said = export.import_run(tmp_path / "hf", tmp_path / "out", argv)
    assert "an equal function" in said and f"python train.py {tmp_path / 'out' / 'start.py'} --resume" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ckpt_0000000.pt", "config.json", "start.py"]
    said = trained(str(tmp_path / "out" / "start.py"), "--resume")
    assert "at step 0" in said
    first, last = read_log(tmp_path / "out", "eval")
    assert first["val_loss"] == pytest.approx(their_loss(theirs, dataset, 16), abs=1e-5) and last["val_loss"] < first["val_loss"]


def test_import_refusals(dataset, tmp_path, capsys):
    """One line, and nothing written: a shape that is not the checkpoint's, an unknown key, a tokenizer that is not the dataset's."""
    theirs_on_disk("Llama", tmp_path / "hf")
    transformers.PreTrainedTokenizerFast(tokenizer_object=_words()).save_pretrained(tmp_path / "hf")
    for argv, line in ((["--n_layer=3"], "--n_layer=3 is not the checkpoint's, 2"), (["--n_layers=3"], "unknown key 'n_layers'"),
                       (["--block_size=long"], "block_size='long' is of the wrong type"),
                       ([], "gives other ids than 'bytes'")):
        capsys.readouterr()
        request = ["--from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out"), f"--dataset={dataset}", "--max_iters=200"]
        assert export.main(request + argv) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and line in said and said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def _words():
    from tokenizers import Tokenizer, models
    return Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
