"""
Proves the way out. transformers loads from disk what hf/export.py writes and computes our logits to
1e-5, as a stock class where everything of ours folds away and with our own code elsewhere. It
generates our tokens, is saved again without loss, and tokenizes as tiktoken does.
lm-evaluation-harness measures on it what we compute by hand. Needs transformers; one test, lm-eval.
"""
import importlib.util
import json
import math
import os

import pytest
import tiktoken
import torch
from conftest import (
    ROOT, TINY, UNIFIED, UNIFIED_CONFIG, randomize_scales, read_log, start, tiny_gpt, trained)
from conftest import run as run_program

NEEDS = "needs the optional package"
pytest.importorskip("hypothesis", reason=f"{NEEDS} hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

transformers = pytest.importorskip(
    "transformers", minversion="5", reason=f"{NEEDS} transformers, 5 or later")
pytest.importorskip("safetensors", reason=f"{NEEDS} safetensors")

from hf import export  # noqa: E402
from hf.card import commit  # noqa: E402
from hf.from_hf import need, same_logits  # noqa: E402
from lib.checkpoint import save_checkpoint  # noqa: E402
from lib.config import load_config, to_dict  # noqa: E402
from lib.data import get_encoding  # noqa: E402
from sample import generate, load_model  # noqa: E402

MOE = dict(n_expert=4, n_expert_active=2, d_expert=24)
EVERYWHERE = "q,k,v,gate,up,head,o,down"
ON_QK = dict(scale_placement="dual_norm", scale_placement_on="q,k")
HG = dict(scale_heterogeneous=True)
DP = dict(scale_placement="dual", scale_placement_on=EVERYWHERE)
FAMILIES = {
    "baseline": ("Llama", {}),
    "none": ("Llama", dict(scale_vectors=False)),
    "HG": ("Llama", dict(**HG, n_kv_head=4, rope_theta=500.0)),
    "AP, OR, tied": ("Llama", dict(scale_placement="after", scale_reparam="original",
                                   tie_embeddings=True)),
    "DP, ER, HG": ("Llama", dict(**DP, **HG, scale_reparam="exponential")),
    "zero-centered, tied": ("Llama", dict(scale_reparam="zero_centered", tie_embeddings=True)),
    "qk_norm": ("Qwen3", dict(**HG, qk_norm=True, scale_reparam="original")),
    "DNP on q, k without vectors": ("Qwen3", dict(**ON_QK, scale_vectors=False)),
    "mixture, DP, HG": ("Mixtral", dict(**MOE, **DP, **HG)),
    "DNP on q, k": (None, ON_QK),
    "unified": (None, UNIFIED),
    "unified, tied": (None, dict(**UNIFIED, tie_embeddings=True)),
    "DNP, ER": (None, dict(**HG, scale_placement="dual_norm", scale_reparam="exponential")),
    "Gemma's norms": (None, dict(qk_norm=True, post_norm=True)),
    "LlamaMoE, unified": (None, dict(**MOE, **UNIFIED, d_shared_expert=16, n_dense_layer=1)),
    "mixture, experts of 18": (None, dict(MOE, d_expert=18)),
    "mixture, n_embd of 30": (None, dict(**MOE, n_embd=30, n_head=3, n_kv_head=3)),
    "mixture with Q/K-norm": (None, dict(**MOE, qk_norm=True)),
}
LOG = """\
{"event": "eval", "step": 7, "tokens": 12345, "val_loss": 3.21, "val_bpb": 1.5}
{"event": "eval", "step": 9, "tokens": 99999, "val_loss": 2.0, "val_bpb": 1.0}
"""  # the second is of a step after the checkpoint


def write_run(out, keys, tokenizer="bytes"):
    """A run folder with one checkpoint of a model whose scale vectors have moved. Returns it."""
    keys = {**TINY, "vocab_size": 261, **keys}
    model = randomize_scales(tiny_gpt(**keys)).eval()
    flags = [f"--{key}={value}" for key, value in keys.items()]
    config = to_dict(load_config([*flags, f"--out_dir={out}", "--max_iters=200"]))
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "log.jsonl").write_text(LOG, encoding="utf-8")
    state = {"model": model.state_dict(), "optimizer": {}, "config": config,
             "tokenizer": tokenizer, "data": {"sequences": 0, "train_tokens": 1}, "seconds": 0.0}
    save_checkpoint(out, 7, state, 1)
    return model


def load(folder, auto=transformers.AutoModelForCausalLM):
    own = (folder / "norms.py").exists()
    return auto.from_pretrained(folder, trust_remote_code=own).eval()


def some_ids(length=10, rows=2):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(3))


def greedy(model, idx, tokens, **kwargs):
    return model.generate(idx, max_new_tokens=tokens, do_sample=False, eos_token_id=-1, **kwargs)


@torch.no_grad()
def assert_same_logits(ours, theirs):
    idx = some_ids(16, 3)
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], rtol=0, atol=1e-5)


def one_error(capsys):
    """The one line of an error, and nothing else, on stderr."""
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


# ---- every family, from disk ---------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tmp_path):
    """The expected class in one file and in shards, our logits, our tokens with the cache and
    without, and a save that loses nothing."""
    name, keys = FAMILIES[family]
    model = write_run(tmp_path / "run", keys)
    for size, out in (("5GB", tmp_path / "one"), ("20KB", tmp_path / "shards")):
        line = export.export_run(tmp_path / "run", out, size)
        assert (f"a stock {name}ForCausalLM" if name else "trust_remote_code=True") in line
        assert (len(list(out.glob("*.safetensors"))) > 1) == (size == "20KB")
        theirs = load(out)
        assert type(theirs).__name__ == f"{name or 'ScaleVectors'}ForCausalLM"
        assert theirs.dtype == torch.float32
        assert_same_logits(model, theirs)

    idx = some_ids(6)
    tokens = torch.cat([idx, *generate(model, idx, 8, temperature=0)], dim=1)
    for use_cache in (True, False):
        assert torch.equal(greedy(theirs, idx, 8, use_cache=use_cache), tokens)
    theirs.save_pretrained(tmp_path / "again")
    assert_same_logits(model, load(tmp_path / "again"))

    sampled, encoding, step = load_model(str(out))  # as sample.py does
    torch.testing.assert_close(sampled(idx)[0], model(idx)[0], rtol=0, atol=1e-5)
    assert encoding.name == "bytes" and step == 7


def test_q_and_k_with_one_vector_for_all_heads(tmp_path):
    """DNP's γ_a is each head's own. Where all heads have the same, as at the start, DNP on q and k
    is a Qwen3; one entry that differs decides."""
    model = tiny_gpt(**ON_QK)
    assert export.stock_architecture(model)[0] == "Qwen3ForCausalLM"
    with torch.no_grad():
        for layer in model.layers:
            for m in (layer.attn.q, layer.attn.k):
                heads = m.scale_out.alpha.unflatten(0, (-1, 8))
                heads.copy_(torch.linspace(0.5, 2.0, 8).expand_as(heads))
    theirs, name, _ = export.transformers_model(model, {})
    assert name == "Qwen3ForCausalLM" and same_logits(model, theirs) < 1e-5

    model.layers[1].attn.k.scale_out.alpha.data[-1] += 1e-3
    name, why = export.stock_architecture(model)
    assert name is None
    assert why == "DNP's γ_a differs from head to head, and Qwen3's is one for all heads"


# ---- our own code within transformers ------------------------------------------------------------

@pytest.fixture(scope="module")
def custom_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("custom")
    write_run(folder / "run", {**MOE, **UNIFIED})
    export.export_run(folder / "run", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def custom(custom_folder):
    return load(custom_folder)


def test_auto_model(custom, custom_folder):
    """AutoModel has an entry in auto_map, and gives the same class."""
    model = load(custom_folder, transformers.AutoModel)
    assert type(model).__name__ == "ScaleVectorsForCausalLM"
    idx = some_ids()
    assert torch.equal(model(idx).logits, custom(idx).logits)


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


def test_padding_between_tokens_is_refused(custom):
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding between tokens"):
        custom(some_ids(6, 1), attention_mask=mask)


def test_beams_and_cache_in_pieces(custom):
    """Beams reorder the cache. A cache continued by several tokens at once, as assisted decoding
    does it, sees no future."""
    idx = some_ids(12)
    beams = [greedy(custom, idx[:, :5], 6, num_beams=3, use_cache=c) for c in (True, False)]
    assert torch.equal(*beams)
    with torch.no_grad():
        cache = transformers.DynamicCache(config=custom.config)
        pieces = [custom(piece, cache=cache).logits for piece in idx.split((5, 4, 3), dim=1)]
        expected = custom(idx).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


def test_loss(custom):
    """labels: transformers' loss, shifted, -100 ignored. Only training adds auxiliary losses."""
    idx = some_ids(8)
    labels = idx.clone()
    labels[:, :4] = -100
    logits = custom(idx).logits[:, 3:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 4:].flatten())
    torch.testing.assert_close(custom(idx, labels=labels).loss, expected)
    custom.train()
    loss = custom(idx, labels=labels).loss
    torch.testing.assert_close(loss, expected + custom.gpt.auxiliary_loss())
    custom.eval()


# ---- the tokenizer -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: (tiktoken's encoding, the converted tokenizer as AutoTokenizer loads it)}: bytes; one
    with an unused id and a special token within the ordinary ids, as p50k_base has; gpt2 where its
    vocabulary can be had."""
    merges = {b"th": 257, b"the": 259, b" the": 260, b"  ": 261}
    gaps = tiktoken.Encoding(
        "gaps", pat_str=r"'s| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)} | merges,
        special_tokens={"<|endoftext|>": 256, "<|x|>": 270})
    encodings = [get_encoding("bytes"), gaps]
    try:
        encodings.append(get_encoding("gpt2"))
    except ValueError:
        pass  # it needs the network once: see test_gpt2_is_there
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
    text = "a<|endoftext|>the end"
    for encoding, tokenizer in tokenizers.values():
        ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        assert ends == {encoding.eot_token}
        ids = encoding.encode(text, allowed_special="all")
        assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizers["gaps"][1].encode("<|x|>", add_special_tokens=False) == [270]


def test_gpt2_is_there(tokenizers):
    if "gpt2" not in tokenizers:
        pytest.skip("gpt2's vocabulary cannot be had: connect once, or set TIKTOKEN_CACHE_DIR")
    ids = tokenizers["gpt2"][1].encode("hello world", add_special_tokens=False)
    assert ids == [31373, 995]


# ---- the card, other locales, refusals -----------------------------------------------------------

def test_model_card(tmp_path):
    """Strategy, data, tokens, losses, commit, and how to load it."""
    write_run(tmp_path / "run", UNIFIED)
    export.export_run(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for fact in ("scale_placement=dual_norm", "scale_reparam=original", "tokenizer bytes",
                 "12,345", "3.2100 nats/token", "1.5000 bits/byte", "261 rows, 257 of them tokens",
                 "DNP normalizes the output of v, gate, up, head", "trust_remote_code=True"):
        assert fact in card
    assert "99,999" not in card and (commit() or "unknown") in card


def test_tokenizer_that_is_not_known(tmp_path):
    """Data of token ids without a known tokenizer: the folder has none, and the card says so."""
    write_run(tmp_path / "run", {}, tokenizer="ids")
    out = tmp_path / "out"
    export.export_run(tmp_path / "run", out)
    assert not list(out.glob("tokenizer*")) and load(out).config.eos_token_id is None
    assert "without a known tokenizer" in (out / "README.md").read_text(encoding="utf-8")


BOTH_WAYS = """
import sys
from hf.export import main
run, out, folder, next_run, dataset = sys.argv[1:]
main([run, "--out", out])
main(["--from-hf", folder, "--out", next_run, "--dataset=" + dataset])
"""


def test_files_are_utf8_in_every_locale(dataset, tmp_path):
    """Both directions where the locale's encoding is ASCII, and Python warns of each text file that
    is left to it. There is γ in our code, in the reason and in the card. Nor is there a warning
    that our probe of the tokenizer is longer than the model's context of 16."""
    model = write_run(tmp_path / "weiß", ON_QK)
    write_run(tmp_path / "stock", {})
    export.export_run(tmp_path / "stock", tmp_path / "stock_hf")
    out, start_py = tmp_path / "out, weiß", tmp_path / "next, weiß" / "start.py"
    done = run_program(
        "-X", "warn_default_encoding", "-c", BOTH_WAYS,
        tmp_path / "weiß", out, tmp_path / "stock_hf", start_py.parent, dataset,
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert "because DNP's ?_a differs" in done.stdout and "an equal function" in done.stdout
    assert f"{ROOT}/hf/" not in done.stderr  # with "EncodingWarning"
    assert "Token indices" not in done.stderr and "error" not in done.stderr

    assert_same_logits(model, load(out))
    assert "γ_a" in (out / "README.md").read_text(encoding="utf-8")
    written = load_config([str(start_py)]).out_dir
    assert os.fsencode(written) == os.fsencode(start_py.parent)


def test_refusals(tmp_path, capsys):
    """One line before anything is written, and whatever is there stays."""
    run, full, out = (str(tmp_path / name) for name in ("run", "full", "out"))
    write_run(tmp_path / "run", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_bytes(b"mine")
    for argv, line in (
            ([run, "--out", full], "already holds something"),
            ([str(tmp_path / "none"), "--out", out], "no checkpoint in"),
            (["--out", out], "the run to export is missing"),
            ([run, "--out", out, "--n_layer=3"], "--n_layer=3 is unknown")):
        assert export.main(argv) == 1
        assert line in one_error(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"]
    assert (tmp_path / "full" / "mine.txt").read_bytes() == b"mine"


def test_a_missing_package_is_named():
    line = "no_such_package is not installed: pip install -r requirements-extra.txt"
    with pytest.raises(ValueError, match=line):
        need("no_such_package")


def test_an_error_of_torch_is_one_line(tmp_path, capsys):
    """transformers cannot run a Mixtral with experts of 18 on a CPU: one line, and no folder."""
    config = transformers.MixtralConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, intermediate_size=18,
        num_local_experts=4, sliding_window=None)
    theirs = tmp_path / "theirs"
    transformers.MixtralForCausalLM(config).save_pretrained(theirs)
    capsys.readouterr()
    argv = ["--from-hf", str(theirs), "--out", str(tmp_path / "out"), f"--dataset={tmp_path}"]
    assert export.main(argv) == 1
    assert one_error(capsys) and list(tmp_path.iterdir()) == [theirs]


def test_a_failed_export_leaves_nothing(tmp_path):
    """A checkpoint that is damaged: no folder, and no half of one."""
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
    text, whole = config.read_text(encoding="utf-8"), weights.read_bytes()

    written = json.loads(text)
    heads = "num_attention_heads" if "num_attention_heads" in written else "n_head"
    without_type = {key: value for key, value in written.items() if key != "model_type"}
    no_tokenizer = {**written["trained"], "tokenizer": []}
    damaged = [[], without_type, {**written, heads: "x"},
               {**written, "trained": 5}, {**written, "trained": no_tokenizer}]
    cases = [(json.dumps(value), whole) for value in damaged] + [("{", whole), ("", whole)]
    cases += [(text, whole[:length]) for length in (len(whole) // 2, 5, 0)]

    for text, content in cases:
        config.write_text(text, encoding="utf-8")
        weights.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_model(str(out))
        line = str(error.value)
        assert "\n" not in line and (str(out) in line or "unknown encoding '[]'" in line)


# ---- from a run to an evaluation and back --------------------------------------------------------

COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
SUMS = """\
task: sums
output_type: multiple_choice
doc_to_text: '{{question}}'
doc_to_choice: '{{choices}}'
target_delimiter: ''
doc_to_target: answer
metric_list:
  - metric: acc
"""
TEXT = """\
task: sums_text
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metric_list:
  - metric: bits_per_byte
"""


def write_task(folder):
    """Two tasks of our own for lm-evaluation-harness, without network: sums to complete, and text
    to measure. Returns the documents."""
    folder.mkdir()
    sums = [{"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1}"], "answer": 0,
             "text": f"{a} + {b} = {a + b}\n"} for a, b in ((3, 4), (12, 5), (20, 21), (7, 30))]
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps(s) + "\n" for s in sums), encoding="utf-8")
    for name, text in (("sums", SUMS), ("text", TEXT)):
        task = text + COMMON.format(file=file)
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return sums


@torch.no_grad()
def by_hand(model, encoding, sums):
    """(accuracy, bits per byte) of the tasks from our model's log-probabilities. Where a text has
    no context, <|endoftext|> is the context."""
    def log_probability(context, text):
        ids = encoding.encode(text)
        before = encoding.encode(context) or [encoding.eot_token]
        idx = torch.tensor([before + ids])
        logp = model(idx[:, :-1])[0].log_softmax(-1)
        return logp.gather(-1, idx[:, 1:, None])[0, -len(ids):, 0].sum().item()

    right = 0
    for s in sums:
        correct, wrong = (log_probability(s["question"], choice) for choice in s["choices"])
        right += correct > wrong
    bits = -sum(log_probability("", s["text"]) for s in sums) / math.log(2)
    return right / len(sums), bits / sum(len(s["text"].encode()) for s in sums)


def export_trained(folder, dataset, keys):
    """Train a small run in `folder`, export it with the program, compare. Returns what was loaded
    from the run, and the program's output."""
    run, out = folder, folder.with_name(f"{folder.name}_hf")
    trained(*keys, *start(run, dataset))
    done = run_program("-m", "hf.export", run, "--out", out)
    loaded = load_model(str(run))
    assert_same_logits(loaded[0], load(out))
    flags = (f"--out_dir={out}", "--prompt=1 + ", "--max_new_tokens=5")
    assert run_program("sample.py", *flags).stdout
    return loaded, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=f"{NEEDS} lm-eval")
def test_from_training_to_evaluation(dataset, tmp_path):
    """Train unified, export it, evaluate the folder by lm-eval's own program."""
    (model, encoding, _), line = export_trained(tmp_path / "run", dataset, [UNIFIED_CONFIG])
    assert "our own code" in line
    sums = write_task(tmp_path / "tasks")
    model_args = f"pretrained={tmp_path / 'run_hf'},trust_remote_code=True,dtype=float32"
    run_program("-m", "lm_eval", "--model", "hf", "--model_args", model_args,
                "--tasks", "sums,sums_text", "--include_path", tmp_path / "tasks",
                "--device", "cpu", "--batch_size", "2", "--output_path", tmp_path / "eval",
                env={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})

    file = next((tmp_path / "eval").rglob("*.json"))
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    accuracy, bits_per_byte = by_hand(model, encoding, sums)
    assert results["sums"]["acc,none"] == accuracy
    assert results["sums_text"]["bits_per_byte,none"] == pytest.approx(bits_per_byte, rel=1e-4)


@pytest.mark.slow
def test_from_training_to_a_run_that_continues(dataset, tmp_path):
    """Train a variant that folds, export it, start a run of another strategy from the folder."""
    keys = ["--scale_placement=dual", "--scale_heterogeneous=True"]
    _, line = export_trained(tmp_path / "run", dataset, keys)
    assert "a stock LlamaForCausalLM" in line
    flags = [a for a in start("x", dataset) if a.split("=")[0] not in ("--out_dir", "--init_std")]
    done = run_program("-m", "hf.export", "--from-hf", tmp_path / "run_hf", "--out",
                       tmp_path / "next", "--scale_placement=dual", "--scale_reparam=original",
                       *flags)
    assert "an equal function" in done.stdout

    run_program("train.py", tmp_path / "next" / "start.py", "--resume")
    before = read_log(tmp_path / "run", "eval")[-1]["val_loss"]
    first, *_, last = read_log(tmp_path / "next", "eval")
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(before, abs=1e-5)
    assert last["val_loss"] < before
