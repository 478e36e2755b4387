"""
Proves the way in. A Llama, Mistral, Qwen3, Gemma 3 or Mixtral that transformers made with random
weights and random γ becomes our model with the same logits, for any strategy that is the same
function at γ = 1. A run starts from it with its loss. What has no counterpart is refused by name.
"""
import json

import pytest
import torch
from conftest import UNIFIED, read_log, trained

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

from tokenizers import Tokenizer, models  # noqa: E402

from hf import export  # noqa: E402
from hf.from_hf import read_model, same_logits  # noqa: E402
from lib.data import Dataset, get_encoding  # noqa: E402
from norms import named_scale_vectors  # noqa: E402

ROPE = {"rope_type": "default", "rope_theta": 500.0}
SHAPE = dict(
    vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5,
    rope_parameters=ROPE, bos_token_id=None, eos_token_id=256, pad_token_id=None,
    tie_word_embeddings=False, initializer_range=0.2)
KINDS = {
    "Llama": {},
    "Llama, tied": dict(tie_word_embeddings=True),
    "Mistral": dict(sliding_window=None),
    "Qwen3": {},
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Gemma3": dict(
        hidden_activation="silu", query_pre_attn_scalar=5, layer_types=["full_attention"] * 2,
        tie_word_embeddings=True,
        rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
}
STRATEGIES = [
    {},
    dict(scale_placement="dual", scale_reparam="exponential"),
    dict(scale_placement="after", scale_heterogeneous=True),
    dict(scale_heterogeneous=True, scale_reparam="original"),
    dict(scale_reparam="zero_centered", scale_placement="dual"),
]


def theirs_on_disk(kind, folder, **keys):
    """Save a model of transformers' with random weights and random γ. Returns it."""
    name = kind.split(",")[0]
    make = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    config = make(**{**SHAPE, **KINDS[kind], **keys})
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in norm_weights(theirs):
            p += 0.4 * torch.randn(p.shape)
    theirs.save_pretrained(folder)
    return theirs


def norm_weights(theirs):
    return [p for name, p in theirs.named_parameters() if "norm" in name]


# ---- an equal function ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_equal_function(kind, tmp_path):
    """For every strategy the logits are the original's, and each γ around a map starts at 1. A tied
    head stays tied only where the final norm's γ is 1."""
    theirs = theirs_on_disk(kind, tmp_path / "hf")
    for keys in STRATEGIES:
        if kind == "Gemma3" and keys.get("scale_reparam") == "exponential":
            for p in norm_weights(theirs):
                p.data.abs_()  # ER's γ is positive
            theirs.save_pretrained(tmp_path / "hf")
        model, _ = read_model(tmp_path / "hf", keys)
        assert same_logits(model, theirs) < 2e-5
        for name, vector in named_scale_vectors(model):
            around_a_map = name.rpartition(".")[2] in ("scale_in", "scale_out")
            assert not around_a_map or torch.equal(vector(), torch.ones(vector.shape)), name
        assert not model.config.tie_embeddings  # γ of the final norm went into the head
    if kind == "Llama, tied":
        for p in norm_weights(theirs):
            p.data.fill_(1)
        theirs.save_pretrained(tmp_path / "hf")
        model, _ = read_model(tmp_path / "hf")
        assert model.config.tie_embeddings and same_logits(model, theirs) < 2e-5


def test_qk_norm_becomes_dnp(tmp_path):
    """A strategy with DNP on q and k takes over the Q/K-norm of a Qwen3, and is a Qwen3 again when
    it is exported. With DNP elsewhere the function is another, which same_logits reports."""
    theirs = theirs_on_disk("Qwen3", tmp_path / "hf")
    model, _ = read_model(tmp_path / "hf", {**UNIFIED, "scale_placement_on": "q,k"})
    assert not model.config.qk_norm and same_logits(model, theirs) < 2e-5
    again, name, _ = export.transformers_model(model, {})
    assert name == "Qwen3ForCausalLM" and same_logits(model, again) < 2e-5
    model, _ = read_model(tmp_path / "hf", UNIFIED)
    with pytest.raises(ValueError, match="not the same function"):
        same_logits(model, theirs)


# ---- refusals ------------------------------------------------------------------------------------

LINEAR = {**ROPE, "rope_type": "linear", "factor": 2.0}
TWO_ROPES = {"full_attention": ROPE, "sliding_attention": {**ROPE, "rope_theta": 100.0}}
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
# {line: (kind, what its config.json says instead, keys of the strategy)}
REFUSED = {
    "activation 'gelu'": ("Llama", dict(hidden_act="gelu"), {}),
    "activation 'gelu_new'": ("Gemma3", dict(hidden_activation="gelu_new"), {}),
    "attention_bias=True": ("Llama", dict(attention_bias=True), {}),
    "mlp_bias=True": ("Llama", dict(mlp_bias=True), {}),
    "head_dim=16 x 4 heads is not hidden_size=32": ("Llama", dict(head_dim=16), {}),
    "rope_type='linear'": ("Llama", dict(rope_parameters=LINEAR), {}),
    "rope_theta differs between layers": ("Gemma3", dict(**SLIDING, rope_parameters=TWO_ROPES), {}),
    "sliding_window=8": ("Gemma3", dict(**SLIDING, sliding_window=8), {}),
    "sliding_window=8 has no counterpart": ("Mistral", dict(sliding_window=8), {}),
    "final_logit_softcapping=30.0": ("Gemma3", dict(final_logit_softcapping=30.0), {}),
    "model_type is 'gpt_neox'": ("Llama", dict(model_type="gpt_neox"), {}),
    "missing keys": ("Llama", dict(num_hidden_layers=3), {}),
    "unexpected keys": ("Llama", dict(num_hidden_layers=1), {}),
    "block_size=32 is more than the checkpoint's": ("Llama", {}, dict(block_size=32)),
    # no map absorbs γ of Q/K-norm or of Gemma's norms on outputs; some of Gemma's are negative
    "the strategy has no vector there": ("Qwen3", {}, dict(scale_vectors=False)),
    "names only q": ("Qwen3", {}, {**UNIFIED, "scale_placement_on": "q"}),
    "not positive": ("Gemma3", {}, dict(scale_reparam="exponential")),
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused_by_name(line, tmp_path):
    kind, change, keys = REFUSED[line]
    theirs_on_disk(kind, tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, **change}), encoding="utf-8")
    with pytest.raises(ValueError, match=line):
        read_model(tmp_path, keys)


# ---- a run that starts from it -------------------------------------------------------------------

def test_a_run_starts_from_it(dataset, tmp_path):
    """train.py resumes the folder at step 0 with the original's loss, and learns."""
    theirs, out = theirs_on_disk("Qwen3", tmp_path / "hf"), tmp_path / "out"
    export.write_tokenizer(get_encoding("bytes"), tmp_path / "hf", 16)
    line = export.import_run(tmp_path / "hf", out, [
        "--scale_placement=dual", "--scale_reparam=original", "--scale_weight_decay=input_norm",
        f"--dataset={dataset}", "--device=cpu", "--batch_size=4", "--max_iters=12",
        "--warmup_iters=2", "--learning_rate=1e-2", "--eval_interval=12", "--eval_windows=9999"])
    assert "an equal function" in line and f"python train.py {out / 'start.py'} --resume" in line
    assert {p.name for p in out.iterdir()} == {"ckpt_0000000.pt", "config.json", "start.py"}

    assert "at step 0" in trained(str(out / "start.py"), "--resume")
    first, last = read_log(out, "eval")
    val = Dataset(dataset, 16).val
    x, y = map(torch.tensor, val[range(len(val))])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert first["val_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert last["val_loss"] < first["val_loss"]


def test_import_refusals(dataset, tmp_path, capsys):
    """One line and no folder. The last is torch's: no Mixtral with experts of 18 runs on a CPU."""
    theirs_on_disk("Llama", tmp_path / "hf")
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "hf")
    theirs_on_disk("Mixtral", tmp_path / "18", intermediate_size=18)
    for folder, argv, line in (
            ("hf", ["--n_layer=3"], "--n_layer=3 is not the checkpoint's, 2"),
            ("hf", ["--n_layers=3"], "unknown key 'n_layers'"),
            ("hf", ["--block_size=long"], "block_size='long' is of the wrong type"),
            ("hf", [], "gives other ids than 'bytes'"),
            ("none", [], "holds no config.json"),
            ("18", [], "")):
        capsys.readouterr()
        assert export.main(["--from-hf", str(tmp_path / folder), "--out", str(tmp_path / "out"),
                            f"--dataset={dataset}", "--max_iters=200", *argv]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["18", "hf"]
