"""
Proves that our own code in an exported folder keeps transformers' contracts, with transformers
itself: Trainer's accumulation, generate's caches, positions, checkpointing, devices, tokenizer and
files. What it cannot do it refuses by name.
"""
import shutil
import stat

import pytest
import torch
from conftest import UNIFIED

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

import transformers  # noqa: E402
from test_export import custom, greedy, load, some_ids, write_run  # noqa: E402, F401

from hf import export  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense unified model of our own code, exported."""
    folder = tmp_path_factory.mktemp("dense")
    write_run(folder / "run", UNIFIED)
    export.export_run(folder / "run", folder / "out")
    return folder / "out"


# ---- training ------------------------------------------------------------------------------------

class Rows(torch.utils.data.Dataset):
    """Eight sequences whose labels are -100 at a third of the places, of each row another third."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = some_ids(12, 8)[i]
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < i, -100)}


def test_trainers_accumulation(folder, tmp_path):
    """Loss, gradient's norm and weights of a step of SGD, in one batch and in four micro-batches,
    are those of the mean over all labels."""
    rows = [Rows()[i] for i in range(8)]
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    model = load(folder)
    expected = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    weights = {name: p - 0.1 * p.grad for name, p in model.named_parameters()}
    for size in (8, 2):
        trained = load(folder)
        args = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
            max_grad_norm=1e9, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none",
            disable_tqdm=True)
        trainer = transformers.Trainer(trained, args, train_dataset=Rows())
        trainer.train()
        step = trainer.state.log_history[0]
        assert step["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        for name, p in trained.named_parameters():
            torch.testing.assert_close(p, weights[name], rtol=0, atol=1e-6)


def test_loss_of_a_micro_batch(custom):  # noqa: F811
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
    """As transformers switches it on: blocks run twice, and gradients are the same."""
    grads = []
    for enabled in (False, True):
        model, calls = load(folder).train(), []
        if enabled:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == enabled
        model.gpt.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(some_ids(), labels=some_ids()).loss.backward()
        assert len(calls) == 1 + enabled
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads)
    model.gradient_checkpointing_disable()
    assert not model.gpt.config.recompute


def test_parameters_that_a_file_lacks_start_as_ours_do(folder, tmp_path):
    """γ at 1, matrices at random; what the file has is loaded."""
    safetensors = pytest.importorskip("safetensors.torch")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    state = safetensors.load_file(path)
    missing = [name for name in state if "layers.1.attn.q." in name]
    safetensors.save_file({name: state[name] for name in state.keys() - set(missing)}, path,
                          metadata={"format": "pt"})
    found = load(tmp_path).state_dict()
    for name, value in state.items():
        assert torch.equal(found[name], value) == (name not in missing), name
        if name in missing and "scale" in name:
            assert (found[name] == 1).all(), name
        elif name in missing:
            assert 0.8 < found[name].std() * 32 ** 0.5 < 1.2
    assert len(missing) == 4


# ---- caches --------------------------------------------------------------------------------------

def test_every_cache_of_generate(custom):  # noqa: F811
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
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), idx[:1]), dim=1)
    again = greedy(custom, padded, 10, attention_mask=(torch.arange(6) > 1).long()[None])
    assert torch.equal(again[:, 2:], expected[:1])

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


# ---- files ---------------------------------------------------------------------------------------

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
