"""
Proves the way out. transformers loads from disk what hf/export.py writes and computes our logits to
1e-5, as a stock class where everything of ours folds away and with our own code elsewhere. It
generates our tokens, loses nothing when it is saved, and lm-eval measures what we compute by hand.
Our own code keeps transformers' contracts: Trainer's accumulation, generate's caches, positions,
checkpointing, devices, tokenizer and files. What it cannot do it refuses by name.
"""
import contextlib
import json
import math
import shutil
import stat

import pytest
import tiktoken
import torch
from conftest import EVERYWHERE, TINY, UNIFIED, randomize_scales, run, tiny_gpt

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

from hf import export  # noqa: E402
from hf.export import need, same_logits  # noqa: E402
from lib.checkpoint import save_checkpoint  # noqa: E402
from lib.config import load_config, to_dict  # noqa: E402
from lib.data import get_encoding  # noqa: E402
from sample import generate, load_model  # noqa: E402

MOE = dict(n_expert=4, n_expert_active=2, d_expert=24)
ON_QK = dict(scale_placement="dual_norm", scale_placement_on="q,k")
HG = dict(scale_heterogeneous=True)
DP = dict(scale_placement="dual", scale_placement_on=EVERYWHERE)
# {label: (its class in transformers, or None for our own code, keys)}
FAMILIES = {
    "baseline": ("Llama", {}),
    "none": ("Llama", dict(scale_vectors=False)),
    "AP, OR, tied": ("Llama", dict(scale_placement="after", scale_reparam="original",
                                   tie_embeddings=True)),
    "DP, ER, HG": ("Llama", dict(**DP, **HG, scale_reparam="exponential", n_kv_head=4,
                                 rope_theta=500.0)),
    "zero-centered, tied": ("Llama", dict(scale_reparam="zero_centered", tie_embeddings=True)),
    "qk_norm": ("Qwen3", dict(**HG, qk_norm=True, scale_reparam="original", norm_eps=1e-3)),
    "DNP on q, k without vectors": ("Qwen3", dict(**ON_QK, scale_vectors=False)),
    "mixture, DP, HG": ("Mixtral", dict(**MOE, **DP, **HG, load_balance_coef=0.3)),
    "unified, tied": (None, dict(**UNIFIED, tie_embeddings=True)),
    "LlamaMoE, unified": (None, dict(**MOE, **UNIFIED, d_shared_expert=16, n_dense_layer=1)),
}
NOT_STOCK = {
    "DNP normalizes only q": dict(ON_QK, scale_placement_on="q"),
    "post_norm normalizes": dict(qk_norm=True, post_norm=True),
    "Mixtral has no shared expert": dict(**MOE, d_shared_expert=16),
    "Mixtral has no dense layers": dict(**MOE, n_dense_layer=1),
    "Mixtral has no Q/K-norm": dict(**MOE, qk_norm=True),
    "d_expert=18, n_embd=32": dict(MOE, d_expert=18),
    "d_expert=24, n_embd=30": dict(**MOE, n_embd=30, n_head=3, n_kv_head=3),
}


def write_run(out, keys, tokenizer="bytes"):
    """A run folder with one checkpoint of a model whose scale vectors have moved. Returns it."""
    keys = {**TINY, "vocab_size": 261, **keys}
    model = randomize_scales(tiny_gpt(**keys)).eval()
    flags = [f"--{key}={value}" for key, value in keys.items()]
    config = to_dict(load_config([*flags, f"--out_dir={out}", "--max_iters=200"]))
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {"model": model.state_dict(), "optimizer": {}, "config": config,
             "tokenizer": tokenizer, "data": {"sequences": 0, "train_tokens": 1}, "seconds": 0.0}
    save_checkpoint(out, 7, state, 1)
    return model


def load(folder, auto=transformers.AutoModelForCausalLM):
    own = (folder / "norms.py").exists()
    return auto.from_pretrained(folder, trust_remote_code=own).eval()


def some_ids(length=10, rows=2):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(3))


def greedy(model, input_ids, max_new_tokens, **kwargs):
    return model.generate(input_ids=input_ids, max_new_tokens=max_new_tokens, do_sample=False,
                          eos_token_id=-1, **kwargs)


# ---- every family, from disk ---------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    """The expected class, from shards; our logits, our tokens with the cache and without, and a
    save that loses nothing."""
    name, keys = FAMILIES[family]
    model, out = write_run(tmp_path / "run", keys), tmp_path / "out"
    line = export.export_run(tmp_path / "run", out, "20KB")
    assert (f"a stock {name}ForCausalLM" if name else "trust_remote_code=True") in line
    assert len(list(out.glob("*.safetensors"))) > 1
    theirs = load(out)
    assert type(theirs).__name__ == f"{name or 'ScaleVectors'}ForCausalLM"
    assert theirs.dtype == torch.float32 and theirs.config.max_position_embeddings == 16
    assert getattr(theirs.config, "router_aux_loss_coef", 0.3) == 0.3
    same_logits(model, theirs)  # raises on more than rounding

    idx = some_ids(6)
    tokens = torch.cat([idx, *generate(model, idx, 8, temperature=0)], dim=1)
    for use_cache in (True, False):
        assert torch.equal(greedy(theirs, idx, 8, use_cache=use_cache), tokens)
    theirs.save_pretrained(tmp_path / "again")
    same_logits(model, load(tmp_path / "again"))


@pytest.mark.parametrize("reason", NOT_STOCK)
def test_why_no_stock_class_will_do(reason):
    name, why = export.stock_architecture(randomize_scales(tiny_gpt(**NOT_STOCK[reason])))
    assert name is None and reason in why


def test_qwen3_has_one_gamma_for_all_heads(tmp_path):
    """DNP's γ_a of q and k as well: both must repeat one vector over their heads."""
    model = tiny_gpt(**ON_QK)
    vectors = [m.scale_out.alpha.data for layer in model.layers
               for m in (layer.attn.q, layer.attn.k)]
    for alpha in vectors:
        alpha.copy_(torch.linspace(0.5, 2, 8).repeat(len(alpha) // 8))
    theirs, name, _ = export.transformers_model(model, {})
    assert name == "Qwen3ForCausalLM" and same_logits(model, theirs) < 1e-5
    for alpha in vectors:
        alpha[-1] += 0.5
        name, why = export.stock_architecture(model)
        assert name is None and "differs from head to head" in why
        alpha[-1] -= 0.5


def test_cached_tokens_are_checked():
    """A fork whose learned positions start anew after a cache is refused."""
    theirs = export.own_model(tiny_gpt(), {}).eval()
    export.check_cache(theirs)
    positions = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    theirs.gpt.embedding.register_forward_hook(lambda m, x, y: y + positions[:y.size(1)])
    with pytest.raises(ValueError, match="with cached keys and values .* generates other tokens"):
        export.check_cache(theirs)


# ---- our own code within transformers ------------------------------------------------------------

@pytest.fixture(scope="module")
def custom(tmp_path_factory):
    """By AutoModel, which gives the same class as AutoModelForCausalLM."""
    folder = tmp_path_factory.mktemp("custom")
    write_run(folder / "run", {**MOE, **UNIFIED})
    export.export_run(folder / "run", folder / "out")
    return load(folder / "out", transformers.AutoModel)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense unified model of our own code, exported."""
    folder = tmp_path_factory.mktemp("dense")
    write_run(folder / "run", UNIFIED)
    export.export_run(folder / "run", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(custom, side):
    """A row of a padded batch has the logits that it has by itself, so it generates the same."""
    rows = [some_ids(length, 1) for length in (3, 9, 6)]
    idx, mask = torch.zeros(2, 3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - row.size(1), 9) if side == "left" else slice(0, row.size(1))
        idx[i, place], mask[i, place] = row[0], 1

    with torch.no_grad():
        logits = custom(idx, attention_mask=mask).logits
        for i, row in enumerate(rows):
            expected = custom(row).logits[0]
            torch.testing.assert_close(logits[i, mask[i] == 1], expected, rtol=0, atol=1e-5)
    if side == "left":
        together = greedy(custom, idx, 6, attention_mask=mask)
        for i, row in enumerate(rows):
            assert torch.equal(together[i, 9:], greedy(custom, row, 6)[0, row.size(1):])
    with pytest.raises(ValueError, match="padding between tokens"):
        custom(some_ids(6, 1), attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]))


# ---- training ------------------------------------------------------------------------------------

def test_trainers_accumulation(folder, tmp_path):
    """A step of SGD is the same in one batch and in four micro-batches, whose labels are -100 at
    the first i places of row i."""
    rows, steps = [], []
    for i, ids in enumerate(some_ids(12, 8)):
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < i, -100)})
    for size in (8, 2):
        trained = load(folder)
        args = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
            max_grad_norm=1e9, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none",
            disable_tqdm=True)
        trainer = transformers.Trainer(trained, args, train_dataset=rows)
        trainer.train()
        step = trainer.state.log_history[0]
        steps.append([step["loss"], step["grad_norm"], *trained.parameters()])
    torch.testing.assert_close(*map(list, steps), rtol=1e-5, atol=1e-6)


def test_loss_of_a_micro_batch(custom):
    """Of a mixture: labels count by their number, without a row's first, which nothing predicts;
    auxiliary losses by the same share."""
    idx, place = some_ids(8), torch.arange(8)
    labels = torch.where((0 < place) & (place < 4), -100, idx)
    logits = custom(idx).logits[:, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 4:].flatten())
    torch.testing.assert_close(custom(idx, labels=labels).loss, expected)
    torch.testing.assert_close(custom(idx, labels=labels, num_items_in_batch=32).loss, expected / 4)
    custom.train()
    whole = expected + custom.gpt.auxiliary_loss()
    torch.testing.assert_close(custom(idx, labels=labels).loss, whole)
    part = custom(idx, labels=labels, num_items_in_batch=torch.tensor(32)).loss
    torch.testing.assert_close(part, whole / 4)
    custom.eval()


def test_gradient_checkpointing(folder):
    """As transformers switches it on and off: blocks run twice, and gradients are the same."""
    model, calls, grads = load(folder).train(), [], []
    model.gpt.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        model.zero_grad()
        model(some_ids(), labels=some_ids()).loss.backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(model.is_gradient_checkpointing)
    assert calls == [1, 1, True, 1, False]
    torch.testing.assert_close(*grads)


def test_parameters_that_a_file_lacks_start_as_ours_do(folder, tmp_path):
    """γ at 1, matrices at random; what the file has is loaded."""
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    missing = {name: state.pop(name) for name in list(state) if "layers.1.attn.q." in name}
    safetensors.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load(tmp_path).state_dict()
    W = found.pop("gpt.layers.1.attn.q.weight")
    assert 0.8 < W.std() * 32 ** 0.5 < 1.2 and len(missing) == 4
    ones = {name: torch.ones_like(vector) for name, vector in missing.items() if "scale" in name}
    torch.testing.assert_close(found, state | ones, rtol=0, atol=0)


# ---- caches --------------------------------------------------------------------------------------

def test_every_cache_of_generate(custom):
    """Dynamic and static ones give the tokens of no cache, also for several tokens at once, which
    an assistant proposes. Those that hold something else are refused by name."""
    idx = some_ids(4)
    expected = greedy(custom, idx, 10, use_cache=False)
    for kind in ("dynamic", "static"):
        assert torch.equal(greedy(custom, idx, 10, cache_implementation=kind), expected), kind
    again = greedy(custom, idx, 10, prefill_chunk_size=3, cache_implementation="static")
    assert torch.equal(again, expected)
    again = greedy(custom, idx[:1], 10, prompt_lookup_num_tokens=3)
    assert torch.equal(again, expected[:1])
    # beams reorder the cache
    beams = [greedy(custom, idx, 6, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)

    cache, told = transformers.DynamicCache(config=custom.config), []  # early versions 5 are told
    update = cache.update
    cache.update = lambda keys, values, i, place: told.append(
        place["cache_position"].tolist()) or update(keys, values, i, place)
    for piece in (idx, expected[:, 4:5]):
        custom(piece, past_key_values=cache)
    assert told == [[0, 1, 2, 3]] * len(cache.layers) + [[4]] * len(cache.layers)

    layers = [transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=4)]
    offloaded = transformers.DynamicCache(config=custom.config)
    offloaded.offloading = True
    for cache, name in ((transformers.Cache(layers=layers), "DynamicSlidingWindowLayer"),
                        (offloaded, "offloaded DynamicCache"), (((),), "tuple")):
        with pytest.raises(ValueError, match=f"of the kind {name} cannot be used"):
            custom(idx, past_key_values=cache)


def test_a_cache_is_made_where_none_is_given(folder):
    """With use_cache=True, or by default, as by transformers' own models; not in training."""
    model, idx = load(folder), some_ids(9)
    expected = model(idx, use_cache=False)
    assert expected.to_tuple()[1:] == ()
    for asked in (True, None):
        first = model(idx[:, :6], use_cache=asked)
        cache = first.to_tuple()[1]
        mask = torch.ones(2, 9)
        rest = model(idx[:, 6:], past_key_values=cache, attention_mask=mask,
                     position_ids=torch.arange(6, 9)[None])
        torch.testing.assert_close(rest.logits, expected.logits[:, 6:], rtol=0, atol=1e-5)
    assert len(model.train()(idx).to_tuple()) == 1


# ---- arguments, devices --------------------------------------------------------------------------

def test_arguments_are_done_or_refused(folder):
    """None and False ask for nothing. Positions may be given if they are those of whole rows."""
    model, idx = load(folder), some_ids(6)
    expected = model(idx).logits
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = torch.tensor([[9, 9, 0, 1, 2, 3], range(6)])
    for keys in (dict(return_dict=None, output_hidden_states=False, inputs_embeds=None),
                 dict(position_ids=positions[1:]), dict(attention_mask=mask[1:].expand(2, 6))):
        assert torch.equal(model(idx, **keys).logits, expected)
    assert torch.equal(model(idx, return_dict=False, use_cache=False)[0], expected)
    padded = model(idx, attention_mask=mask)
    assert torch.equal(model(idx, attention_mask=mask, position_ids=positions)[0], padded[0])

    for keys, line in (
            (dict(output_hidden_states=True), "output_hidden_states has no effect"),
            (dict(output_attentions=True), "output_attentions has no effect"),
            (dict(logits_to_keep=1), "logits_to_keep has no effect"),
            (dict(inputs_embeds=torch.zeros(2, 6, 32)), "inputs_embeds has no effect"),
            (dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])), "as of packed sequences"),
            (dict(attention_mask=mask[:, :5]), r"shape \(2, 5\), and \(2, 6\) is needed"),
            (dict(attention_mask=torch.ones(2, 1, 6, 6)), r"and \(2, 6\) is needed"),
            (dict(attention_mask=mask, use_cache=True), "leave the cache out")):
        with pytest.raises(ValueError, match=line):
            model(idx, **keys)
    with pytest.raises(ValueError, match="output_hidden_states has no effect"):
        greedy(model, idx, 2, output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="vocab_size=261; train one with another"):
        model.resize_token_embeddings(300)
    assert model.resize_token_embeddings(261) is model.get_input_embeddings()


def test_devices_and_attention(folder):
    """device_map="auto" may choose a device, and never a split; sdpa is what there is."""
    accelerate = pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, device_map="auto", attn_implementation="sdpa")
    size = accelerate.utils.compute_module_sizes(model)[""]
    places = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": size // 2, "disk": 2 * size},
        no_split_module_classes=list(model._no_split_modules))
    assert len(set(places.values())) == 1
    for split in ({"gpt.layers.0": 0, "gpt.layers.1": 1}, {"": "disk"}):
        model.hf_device_map = split
        with pytest.raises(ValueError, match="runs on one device, and device_map has put it on"):
            model(some_ids())


# ---- the tokenizer -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (tiktoken's encoding, the converted tokenizer)}: bytes; one with an unused id and a
    special token within the ordinary ids, as p50k_base has; gpt2 where it can be had."""
    merges = {b"th": 257, b"the": 259, b" the": 260, b"  ": 261}
    gaps = tiktoken.Encoding(
        "gaps", pat_str=r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)} | merges,
        special_tokens={"<|endoftext|>": 256, "<|x|>": 270})
    encodings, found = [get_encoding("bytes"), gaps], {}
    with contextlib.suppress(ValueError):  # it needs the network once
        encodings.append(get_encoding("gpt2"))
    for encoding in encodings:
        folder = tmp_path_factory.mktemp(encoding.name)
        export.write_tokenizer(encoding, folder, 16)
        found[encoding.name] = encoding, transformers.AutoTokenizer.from_pretrained(folder)
    return found


@settings(max_examples=120, deadline=None)
@given(text=st.text(), end=st.sampled_from(["", "<|endoftext|>the end <|x|>"]))
def test_tokenizer(tokenizers, text, end):
    """The same ids as tiktoken, special tokens among them, and the text back."""
    for encoding, tokenizer in tokenizers.values():
        ids = encoding.encode(text + end, allowed_special="all")
        assert tokenizer.encode(text + end, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text + end
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        assert ends == {encoding.eot_token}


def test_the_tokenizer_pads_left_and_names_what_the_model_reads(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a longer text", "short"], return_tensors="pt", padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1] * 13, [0] * 8 + [1] * 5]
    assert greedy(load(folder), max_new_tokens=3, **batch).shape == (2, 16)


def test_files_are_readable_as_other_files_are(folder):
    (folder.parent / "other").touch()
    mode = stat.S_IMODE((folder.parent / "other").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {mode}
    (folder.parent / "others").mkdir()
    assert folder.stat().st_mode == (folder.parent / "others").stat().st_mode


# ---- the card, other locales, refusals -----------------------------------------------------------

def test_model_card(folder):
    """Strategy, data, steps, and how to load it."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    for fact in ("scale_placement=dual_norm", "scale_reparam=original", "tokenizer bytes",
                 "scale_weight_decay=all", "after 7 steps", "trust_remote_code=True",
                 "DNP normalizes the output of v, gate, up, head"):
        assert fact in card


def test_data_without_a_known_tokenizer(tmp_path):
    write_run(tmp_path / "run", {}, tokenizer="ids")
    export.export_run(tmp_path / "run", tmp_path / "hf")
    assert "trust_remote_code" not in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert load(tmp_path / "hf").config.eos_token_id is None


@pytest.mark.slow
def test_files_are_utf8_in_every_locale(tmp_path):
    """Also where it is ASCII; our code, reason and card have γ. There is no warning that our probe
    of the tokenizer is longer than the context of 16."""
    model, out = write_run(tmp_path / "weiß", ON_QK), tmp_path / "out, weiß"
    done = run("-m", "hf.export", tmp_path / "weiß", "--out", out,
               env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert "because DNP's ?_a differs" in done.stdout and done.stderr == ""
    assert same_logits(model, load(out)) < 1e-5
    assert "γ_a" in (out / "README.md").read_text(encoding="utf-8")


def test_refusals(tmp_path, capsys):
    """One line, nothing is written, and whatever is there stays."""
    run, full, out = (str(tmp_path / name) for name in ("run", "full", "out"))
    write_run(tmp_path / "run", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_bytes(b"mine")
    for argv, line in (
            ([run, "--out", full], "already holds something"),
            ([full, "--out", out], "no checkpoint in"),
            (["--out", out], "the run to export is missing"),
            ([run, "--out", out, "--n_layer=3"], "--n_layer=3 is unknown")):
        assert export.main(argv) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"]
    assert (tmp_path / "full" / "mine.txt").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="no_such_package is not installed: pip install -r"):
        need("no_such_package")


# ---- from a run to an evaluation -----------------------------------------------------------------

@pytest.mark.slow
def test_from_training_to_evaluation(undisturbed, tmp_path):
    """Export a run of train.py and evaluate the folder, each by its own program. The task is one of
    our own, without network."""
    pytest.importorskip("lm_eval")
    out, file = tmp_path / "hf", tmp_path / "sums.jsonl"
    assert "our own code" in run("-m", "hf.export", undisturbed[0], "--out", out).stdout

    texts = [f"{a} + {b} = {a + b}\n" for a, b in ((3, 4), (12, 5), (20, 21), (7, 30))]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    task = {"task": "sums", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
            "test_split": "test", "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}}}
    (tmp_path / "sums.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    run("-m", "lm_eval", "--model", "hf", "--tasks", "sums", "--include_path", tmp_path,
        "--model_args", f"pretrained={out},trust_remote_code=True,dtype=float32",
        "--device", "cpu", "--batch_size", "2", "--output_path", tmp_path / "eval",
        env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    results = json.loads(next((tmp_path / "eval").rglob("*.json")).read_text(encoding="utf-8"))

    model, encoding, _ = load_model(str(undisturbed[0]))
    nats = 0.0
    for text in texts:  # one token a byte, after <|endoftext|>
        idx = torch.tensor([[encoding.eot_token, *encoding.encode(text)]])
        nats += len(text) * model(idx[:, :-1], idx[:, 1:])[1].item()
    expected = nats / math.log(2) / len("".join(texts))
    found = results["results"]["sums"]["bits_per_byte,none"]
    assert found == pytest.approx(expected, rel=1e-4)
