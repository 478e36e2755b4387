"""
Proves the way out: what export.py writes is loaded by transformers from disk and computes our logits to 1e-5, as a stock class where
everything of ours folds away and with our own code where not; it generates our tokens, is saved again without loss, tokenizes as
tiktoken does, and lm-evaluation-harness measures on it what we compute by hand. Needs transformers; a part needs lm-eval.
"""
import importlib.util
import json
import math

import pytest
import tiktoken
import torch
from conftest import TINY, UNIFIED, UNIFIED_CONFIG, randomize_scales, read_log, start, tiny_gpt, trained
from conftest import run as run_program

pytest.importorskip("hypothesis", reason="needs the optional package hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

transformers = pytest.importorskip("transformers", minversion="5", reason="needs the optional package transformers, 5 or later")
pytest.importorskip("safetensors", reason="needs the optional package safetensors")

from hf import export  # noqa: E402
from hf.from_hf import need, same_logits  # noqa: E402
from lib.checkpoint import save_checkpoint  # noqa: E402
from lib.config import load_config, to_dict  # noqa: E402
from lib.data import get_encoding  # noqa: E402
from sample import load_model  # noqa: E402

MOE = dict(n_expert=4, n_expert_active=2, d_expert=24)
EVERYWHERE = "q,k,v,gate,up,head,o,down"
ON_QK = dict(scale_placement="dual_norm", scale_placement_on="q,k")
FAMILIES = {
    "baseline": ("Llama", {}),
    "none": ("Llama", dict(scale_vectors=False)),
    "HG": ("Llama", dict(scale_heterogeneous=True, n_kv_head=4, rope_theta=500.0)),
    "AP, OR, tied": ("Llama", dict(scale_placement="after", scale_reparam="original", tie_embeddings=True)),
    "DP, ER, HG": ("Llama", dict(scale_placement="dual", scale_heterogeneous=True, scale_reparam="exponential",
                                 scale_placement_on=EVERYWHERE)),
    "zero-centered, tied": ("Llama", dict(scale_reparam="zero_centered", tie_embeddings=True)),
    "qk_norm": ("Qwen3", dict(qk_norm=True, scale_heterogeneous=True, scale_reparam="original")),
    "DNP on q, k without vectors": ("Qwen3", dict(scale_vectors=False, **ON_QK)),
    "mixture, DP, HG": ("Mixtral", dict(**MOE, scale_placement="dual", scale_heterogeneous=True, scale_placement_on=EVERYWHERE)),
    "DNP on q, k": (None, ON_QK),
    "unified": (None, UNIFIED),
    "unified, tied": (None, dict(**UNIFIED, tie_embeddings=True)),
    "DNP, ER": (None, dict(scale_placement="dual_norm", scale_reparam="exponential", scale_heterogeneous=True)),
    "Gemma's norms": (None, dict(qk_norm=True, post_norm=True)),
    "LlamaMoE, unified": (None, dict(**MOE, **UNIFIED, d_shared_expert=16, n_dense_layer=1)),
    "mixture, experts of 18": (None, dict(n_expert=4, n_expert_active=2, d_expert=18)),
    "mixture, n_embd of 30": (None, dict(**MOE, n_embd=30, n_head=3, n_kv_head=3)),
    "mixture with Q/K-norm": (None, dict(**MOE, qk_norm=True)),
}


def write_run(out, keys, tokenizer="bytes"):
    """A run folder that holds one checkpoint of a model whose scale vectors have moved. Returns the model."""
    keys = {**TINY, "vocab_size": 261, **keys}
    model = randomize_scales(tiny_gpt(**keys)).eval()
    config = load_config([f"--{key}={value}" for key, value in keys.items()] + [f"--out_dir={out}", "--max_iters=200"])
    out.mkdir()
    (out / "config.json").write_text(json.dumps(to_dict(config)))
    (out / "log.jsonl").write_text('{"event": "eval", "step": 7, "tokens": 12345, "val_loss": 3.21, "val_bpb": 1.5}\n'
                                 '{"event": "eval", "step": 9, "tokens": 99999, "val_loss": 2.0, "val_bpb": 1.0}\n')  # after the checkpoint
    save_checkpoint(out, 7, {"model": model.state_dict(), "optimizer": {}, "config": to_dict(config), "tokenizer": tokenizer, "rng": [],
                             "seconds": 0.0, "data": {"sequences": 0, "train_tokens": 1}}, 1)
    return model


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=(folder / "norms.py").exists(), **kwargs).eval()


def some_ids(length=10, rows=2):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    idx = some_ids(16, 3)
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# every family, from disk

@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    """Single file and shards: the expected class, our logits, our tokens with the cache and without, and a save that loses nothing."""
    name, keys = FAMILIES[family]
    model = write_run(tmp_path / "run", keys)
    for size, out in (("5GB", tmp_path / "one"), ("20KB", tmp_path / "shards")):
        said = export.export_run(tmp_path / "run", out, size)
        assert (f"a stock {name}ForCausalLM" if name else "trust_remote_code=True") in said
        assert (len(list(out.glob("*.safetensors"))) > 1) == (size == "20KB")
        theirs = load(out)
        assert type(theirs).__name__ == f"{name or 'ScaleVectors'}ForCausalLM" and theirs.dtype == torch.float32
        assert_same_logits(model, theirs)
    idx = some_ids(6)
    ours = torch.cat([idx, *model.generate(idx, 8, temperature=0)], dim=1)
    for use_cache in (True, False):
        tokens = theirs.generate(idx, max_new_tokens=8, do_sample=False, use_cache=use_cache, eos_token_id=-1)
        assert torch.equal(tokens, ours)
    theirs.save_pretrained(tmp_path / "again")
    assert_same_logits(model, load(tmp_path / "again"))
    sampled, encoding, step = load_model(str(out))  # what sample.py reads
    torch.testing.assert_close(sampled(idx)[0], model(idx)[0], rtol=0, atol=1e-5)
    assert encoding.name == "bytes" and step == 7


def test_q_and_k_with_one_vector_for_all_heads(tmp_path):
    """DNP's γ_a is each head's own. Where all heads have the same, as at the start, q and k under DNP are a Qwen3; one entry decides."""
    model = tiny_gpt(**ON_QK)
    assert export.stock_architecture(model)[0] == "Qwen3ForCausalLM"
    with torch.no_grad():
        for layer in model.layers:
            for b in "qk":
                vector = getattr(layer.attn, b).scale_out.alpha
                vector.copy_(torch.linspace(0.5, 2.0, 8).repeat(len(vector) // 8))
    theirs, name, _ = export.transformers_model(model, {})
    assert name == "Qwen3ForCausalLM" and same_logits(model, theirs) < 1e-5
    model.layers[1].attn.k.scale_out.alpha.data[-1] += 1e-3
    assert export.stock_architecture(model) == (None, "DNP's γ_a differs from head to head, and Qwen3's is one for all heads")


# ---------------------------------------------------------------------------------------------------------------------
# our own code within transformers

@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("custom")
    write_run(folder / "run", {**MOE, **UNIFIED})
    export.export_run(folder / "run", folder / "out")
    return load(folder / "out")


def test_padding(custom):
    """A row of a padded batch has the logits that it has alone, padding left or right; so a batch generates what its rows do."""
    rows = [some_ids(length, 1) for length in (3, 9, 6)]
    for side in ("left", "right"):
        idx, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(9 - row.size(1), 9) if side == "left" else slice(0, row.size(1))
            idx[i, place], mask[i, place] = row[0], 1
        with torch.no_grad():
            logits = custom(idx, attention_mask=mask).logits
            for i, row in enumerate(rows):
                torch.testing.assert_close(logits[i, mask[i] == 1], custom(row).logits[0], rtol=0, atol=1e-5)
        if side == "left":
            together = custom.generate(idx, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=-1)
            for i, row in enumerate(rows):
                alone = custom.generate(row, max_new_tokens=6, do_sample=False, eos_token_id=-1)
                assert torch.equal(together[i, 9:], alone[0, row.size(1):])
    mask[0] = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="padding between tokens"):
        custom(idx, attention_mask=mask)


def test_beams_and_cache_in_pieces(custom):
    """Beams reorder the cache; a cache continued by several tokens at once, as assisted decoding does it, sees no future."""
    idx = some_ids(5)
    beams = [custom.generate(idx, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=c, eos_token_id=-1) for c in (True, False)]
    assert torch.equal(*beams)
    idx = some_ids(12)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=custom.config)
        pieces = [custom(piece, cache=cache).logits for piece in idx.split((5, 4, 3), dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), custom(idx).logits, rtol=0, atol=1e-5)


def test_loss(custom):
    """labels: transformers' loss, shifted, -100 ignored; the auxiliary losses are added in training alone."""
    idx = some_ids(8)
    labels = idx.clone()
    labels[:, :4] = -100
    wanted = torch.nn.functional.cross_entropy(custom(idx).logits[:, 3:-1].flatten(0, 1), idx[:, 4:].flatten())
    torch.testing.assert_close(custom(idx, labels=labels).loss, wanted)
    custom.train()
    torch.testing.assert_close(custom(idx, labels=labels).loss, wanted + custom.gpt.auxiliary_loss())
    custom.eval()


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer, card, refusals

@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (tiktoken's encoding, the converted tokenizer as AutoTokenizer loads it)}: bytes; one with an unused id and a special
    token within the ordinary ids, as p50k_base has; gpt2 where it can be had."""
    merges = {b"th": 257, b"the": 259, b" the": 260, b"  ": 261}
    gaps = tiktoken.Encoding("gaps", pat_str=r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
                             mergeable_ranks={bytes([i]): i for i in range(256)} | merges,
                             special_tokens={"<|endoftext|>": 256, "<|x|>": 270})
    encodings = [get_encoding("bytes"), gaps]
    try:
        encodings.append(get_encoding("gpt2"))
    except ValueError:
        pass  # needs the network once; test_gpt2_is_there says so
    found = {}
    for encoding in encodings:
        folder = tmp_path_factory.mktemp(encoding.name)
        export.write_tokenizer(encoding, folder, 16)
        found[encoding.name] = encoding, transformers.AutoTokenizer.from_pretrained(folder)
    return found


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_tokenizer(tokenizers, text):
    """The same ids as tiktoken, and the text back."""
    for encoding, tokenizer in tokenizers.values():
        ids = encoding.encode(text, disallowed_special=())
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


def test_special_tokens(tokenizers):
    for encoding, tokenizer in tokenizers.values():
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == encoding.eot_token
        text = "a<|endoftext|>the end"
        assert tokenizer.encode(text, add_special_tokens=False) == encoding.encode(text, allowed_special="all")
    assert tokenizers["gaps"][1].encode("<|x|>", add_special_tokens=False) == [270]


def test_gpt2_is_there(tokenizers):
    if "gpt2" not in tokenizers:
        pytest.skip("gpt2's vocabulary cannot be had: connect once, or set TIKTOKEN_CACHE_DIR")
    assert tokenizers["gpt2"][1].encode("hello world", add_special_tokens=False) == [31373, 995]


def test_model_card(tmp_path):
    """Strategy, data, tokens, losses, commit; and how to load it."""
    write_run(tmp_path / "run", UNIFIED)
    export.export_run(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("scale_placement=dual_norm", "scale_reparam=original", "tokenizer bytes", "12,345", "3.2100 nats/token",
                 "1.5000 bits/byte", "261 rows, 257 of them tokens", "trust_remote_code=True",
                 "DNP normalizes the output of v, gate, up, head"):
        assert fact in card
    assert "99,999" not in card and (export.commit() or "unknown") in card


def test_tokenizer_that_is_not_known(tmp_path):
    """Data of token ids without a known tokenizer: the folder has none, and the card says so."""
    write_run(tmp_path / "run", {}, tokenizer="ids")
    export.export_run(tmp_path / "run", tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*")) and "without a known tokenizer" in (tmp_path / "out" / "README.md").read_text()
    assert load(tmp_path / "out").config.eos_token_id is None


def test_refusals(tmp_path, capsys):
    """One line, before anything is written; what is there stays."""
    write_run(tmp_path / "run", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for argv, line in ((["run", "--out", "full"], "already holds something"), (["none", "--out", "out"], "no checkpoint in"),
                       (["--out", "out"], "which run?"), (["run", "--out", "out", "--n_layer=3"], "--n_layer=3 is unknown")):
        argv = [str(tmp_path / a) if a in ("run", "full", "none", "out") else a for a in argv]
        assert export.main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and line in said and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"] and (tmp_path / "full" / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="no_such_package is not installed: pip install -r requirements-extra.txt"):
        need("no_such_package")


def test_an_error_of_torch_is_one_line(tmp_path, capsys):
    """A Mixtral of theirs with experts of 18, which transformers itself cannot run on a CPU: no traceback, and nothing is left."""
    config = transformers.MixtralConfig(vocab_size=261, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                        max_position_embeddings=16, intermediate_size=18, num_local_experts=4, sliding_window=None)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "theirs")
    capsys.readouterr()
    assert export.main(["--from-hf", str(tmp_path / "theirs"), "--out", str(tmp_path / "out"), f"--dataset={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["theirs"]


def test_a_failed_export_leaves_nothing(tmp_path):
    """A checkpoint that is damaged: no folder, no half of one."""
    write_run(tmp_path / "run", {})
    path = tmp_path / "run" / "ckpt_0000007.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="none of its 1 checkpoints is whole"):
        export.export_run(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("keys", [{}, UNIFIED], ids=["stock", "own code"])
def test_a_damaged_folder_is_one_line_when_it_is_sampled_from(keys, tmp_path):
    write_run(tmp_path / "run", keys)
    out = tmp_path / "out"
    export.export_run(tmp_path / "run", out)
    config, weights = out / "config.json", out / "model.safetensors"
    whole, written = weights.read_bytes(), json.loads(config.read_text())
    heads = "num_attention_heads" if "num_attention_heads" in written else "n_head"
    damaged = [json.dumps(x) for x in ([], {**written, "trained": 5}, {**written, "trained": {**written["trained"], "tokenizer": []}},
                                       {**written, heads: "x"}, {k: v for k, v in written.items() if k != "model_type"})] + ["{", ""]
    for text, content in [(text, whole) for text in damaged] + [(json.dumps(written), whole[:n]) for n in (len(whole) // 2, 5, 0)]:
        config.write_text(text)
        weights.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_model(str(out))
        assert "\n" not in str(error.value) and (str(out) in str(error.value) or "unknown encoding '[]'" in str(error.value))


# ---------------------------------------------------------------------------------------------------------------------
# from a run to an evaluation and back

def write_task(folder):
    """A task of our own for lm-evaluation-harness, without network: sums to complete, and text to measure. Returns its documents."""
    folder.mkdir()
    sums = [{"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1}"], "answer": 0, "text": f"{a} + {b} = {a + b}\n"}
            for a, b in ((3, 4), (12, 5), (20, 21), (7, 30))]
    (folder / "sums.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sums))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'sums.jsonl'}\ntest_split: test\n"
    (folder / "sums.yaml").write_text("task: sums\n" + common + "output_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
                                      "doc_to_choice: '{{choices}}'\ntarget_delimiter: ''\ndoc_to_target: answer\n"
                                      "metric_list:\n  - metric: acc\n")
    (folder / "text.yaml").write_text("task: sums_text\n" + common + "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
                                      "doc_to_target: '{{text}}'\nmetric_list:\n  - metric: bits_per_byte\n")
    return sums


@torch.no_grad()
def by_hand(model, encoding, sums):
    """(accuracy, bits per byte) of the task from our model's log-probabilities. Without a context <|endoftext|> is it."""
    def log_probability(context, text):
        n = len(encoding.encode(text))
        ids = torch.tensor([(encoding.encode(context) or [encoding.eot_token]) + encoding.encode(text)])
        logp = model(ids[:, :-1])[0].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, -n:, 0]
        return logp.sum().item()
    right = [log_probability(s["question"], s["choices"][0]) > log_probability(s["question"], s["choices"][1]) for s in sums]
    bits = -sum(log_probability("", s["text"]) for s in sums) / math.log(2)
    return sum(right) / len(right), bits / sum(len(s["text"].encode()) for s in sums)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the optional package lm-eval")
def test_from_training_to_evaluation_and_back(dataset, tmp_path):
    """Train; export unified and a variant that folds; load both; evaluate one by lm-eval's own program; start a run from the other."""
    models = {}
    for name, keys in (("unified", [UNIFIED_CONFIG]), ("dual", ["--scale_placement=dual", "--scale_heterogeneous=True"])):
        trained(*keys, *start(tmp_path / name, dataset))
        done = run_program("-m", "hf.export", tmp_path / name, "--out", tmp_path / f"{name}_hf")
        assert ("our own code" if name == "unified" else "a stock LlamaForCausalLM") in done.stdout
        models[name] = load_model(str(tmp_path / name))
        assert_same_logits(models[name][0], load(tmp_path / f"{name}_hf"))
        assert run_program("sample.py", f"--out_dir={tmp_path / f'{name}_hf'}", "--prompt=1 + ", "--max_new_tokens=5").stdout

    sums = write_task(tmp_path / "tasks")
    model_args = f"pretrained={tmp_path / 'unified_hf'},trust_remote_code=True,dtype=float32"
    run_program("-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--tasks", "sums,sums_text",
                "--include_path", tmp_path / "tasks", "--device", "cpu", "--batch_size", "2",
                "--output_path", tmp_path / "eval", env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    results = json.loads(next((tmp_path / "eval").rglob("*.json")).read_text())["results"]
    accuracy, bits_per_byte = by_hand(*models["unified"][:2], sums)
    assert results["sums"]["acc,none"] == accuracy
    assert results["sums_text"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, rel=1e-4)

    done = run_program("-m", "hf.export", "--from-hf", tmp_path / "dual_hf", "--out", tmp_path / "next", "--scale_placement=dual",
                       "--scale_reparam=original", *[a for a in start("x", dataset) if a.split("=")[0] not in ("--out_dir", "--init_std")])
    assert "an equal function" in done.stdout
    run_program("train.py", tmp_path / "next" / "start.py", "--resume")
    before, after = read_log(tmp_path / "dual", "eval")[-1], read_log(tmp_path / "next", "eval")[0]
    assert after["step"] == 0 and after["val_loss"] == pytest.approx(before["val_loss"], abs=1e-5)
    assert read_log(tmp_path / "next", "eval")[-1]["val_loss"] < before["val_loss"]
