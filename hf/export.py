"""
A trained model for everyone's tools, and a model of theirs for training here.

  python -m hf.export out/quickstart --out exported                     run -> Hugging Face folder
  python -m hf.export --from-hf FOLDER --out out/x configs/unified_120m.py --dataset=data/x   Hugging Face folder -> run, at step 0

Scale vectors that a weight can take over are folded away. If nothing of ours is left, the folder is a stock Llama, Qwen3 or Mixtral;
else it holds our own norms.py and model.py beside the weights, for trust_remote_code=True. The logits are the same either way.

  stock_architecture   which of the two, and why
  stock_state          our weights by transformers' names
  write_tokenizer      tiktoken's encoding by transformers' converter
  model_card           README.md: strategy, data, tokens, losses, commit
  export_run, import_run   the two directions; each folder appears whole or not at all
"""
import argparse
import base64
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf.from_hf import NORMALIZE_QK, need, quiet, read_config, read_model, same_logits, shape_keys
from lib.checkpoint import save_checkpoint
from lib.config import check_type, known_key, load_config, parse_value, read_config_file, to_dict
from lib.data import Dataset, get_encoding
from norms import PLACEMENTS, fold_scale_vectors, named_scale_vectors
from sample import load_model

CODE = ("hf/modeling_scale_vectors.py", "model.py", "norms.py")
PROBE = "def f(x):\n    return x + 1  # The café's 3 naïve tests, №42:\n\n\t'don’t'\r\n"  # where tokenizers that differ show it


# ---------------------------------------------------------------------------------------------------------------------
# which of the two

def stock_architecture(model):
    """(name of the class of transformers that computes the same function, or None; why). model: a GPT, folded."""
    c = model.config
    ours = {model.embedding.weight, *(m.weight for _, m in model.scaled_linears())}
    ours |= {p for _, vector in named_scale_vectors(model) for p in vector.parameters()}
    if others := [name for name, p in model.named_parameters() if p not in ours]:
        return None, f"no class of transformers has the parameter {others[0]}"
    is_linear = PLACEMENTS[c.scale_placement].output is None
    if c.placed_maps and c.scale_placement != "dual_norm" and not is_linear:
        return None, f"scale_placement={c.scale_placement!r} is not a linear map"
    normalized = [] if is_linear else c.placed_maps
    others = [name for name in normalized if name not in ("q", "k")]
    if others:
        return None, f"DNP normalizes the output of {', '.join(others)}"
    if c.post_norm:
        return None, "post_norm normalizes each sub-layer's output"
    if len(normalized) == 1:
        return None, f"DNP normalizes {normalized[0]} alone of q and k"
    if normalized and not all(same_for_all_heads(layer.attn, c.head_dim) for layer in model.layers):
        return None, "DNP's γ_a differs from head to head, and Qwen3's is one for all heads"
    if c.n_expert and (c.d_shared_expert or c.n_dense_layer or normalized or c.qk_norm):
        return None, "Mixtral has no " + ("shared expert" if c.d_shared_expert else "dense layers" if c.n_dense_layer else "Q/K-norm")
    if c.n_expert and (c.d_expert % 8 or c.n_embd % 8):
        return None, f"transformers' Mixtral needs multiples of 8, and d_expert={c.d_expert}, n_embd={c.n_embd}"
    if c.n_expert:
        return "MixtralForCausalLM", "every scale vector folds into a weight"
    if normalized or c.qk_norm:
        return "Qwen3ForCausalLM", "q and k are normalized, and every other scale vector folds into a weight"
    return "LlamaForCausalLM", "every scale vector folds into a weight"


def same_for_all_heads(attn, head_dim):
    """True if the output-side vectors of q and k, where there are any, repeat one vector (head_dim,) for every head."""
    vectors = [m.scale_out for m in (attn.q, attn.k) if m.scale_out]
    heads = [vector().unflatten(0, (-1, head_dim)) for vector in vectors]
    return all(torch.equal(h, h[:1].expand_as(h)) for h in heads)


def stock_config(name, c, tied, ids):
    """The configuration of the transformers class `name` for our GPTConfig."""
    extra = {"num_local_experts": c.n_expert, "num_experts_per_tok": c.n_expert_active, "intermediate_size": c.d_expert,
             "router_aux_loss_coef": c.load_balance_coef} if c.n_expert else {"intermediate_size": c.d_ff}
    return getattr(need("transformers"), name).config_class(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=tied, **extra, **ids)


def stock_state(model, tied):
    """The tensors of a folded GPT by transformers' names. What remains of γ is where they have one; elsewhere theirs is 1.
    A tied head with an output side is written as a matrix of its own, diag(u) W."""
    c = model.config
    ones = torch.ones(c.n_embd)
    head, v, u = model.head.weight, model.head.scale_in, model.head.scale_out
    state = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": head if tied else head.clone(),
             "model.norm.weight": v() if v else ones}
    if u:
        state["lm_head.weight"] = head * u().unsqueeze(-1)
    for i, layer in enumerate(model.layers):
        p, attn, mlp = f"model.layers.{i}", layer.attn, layer.mlp
        state |= {f"{p}.self_attn.{b}_proj.weight": getattr(attn, b).weight for b in "qkvo"}
        state |= {f"{p}.input_layernorm.weight": ones, f"{p}.post_attention_layernorm.weight": ones}
        if layer.moe:
            gate_up = torch.cat((mlp.gate.weight, mlp.up.weight), dim=1)
            state |= {f"{p}.mlp.gate.weight": mlp.router.weight,
                      f"{p}.mlp.experts.down_proj": mlp.down.weight,
                      f"{p}.mlp.experts.gate_up_proj": gate_up}
        else:
            state |= {f"{p}.mlp.{b}_proj.weight": getattr(mlp, b).weight for b in ("gate", "up", "down")}
        if c.qk_norm or "q" in c.placed_maps and c.scale_placement == "dual_norm":
            state |= {f"{p}.self_attn.{b}_norm.weight": head_norm(attn, b, c) for b in "qk"}
    return state


def head_norm(attn, b, c):
    """γ (head_dim,) of Q/K-norm, or of DNP on q or k when all heads have the same."""
    scale = getattr(attn, f"{b}_norm").scale if c.qk_norm else getattr(attn, b).scale_out
    return torch.ones(c.head_dim) if scale is None else scale()[:c.head_dim]


# ---------------------------------------------------------------------------------------------------------------------
# what is written

@torch.no_grad()
def transformers_model(model, ids):
    """(transformers' model with our GPT's function, the name of its class or None for our own code, why)."""
    transformers = need("transformers", "safetensors")[0]
    folded = fold_scale_vectors(model)
    name, why = stock_architecture(folded)
    with quiet(transformers):
        if name:
            tied = model.config.tie_embeddings and not folded.head.scale_out
            theirs = getattr(transformers, name)(stock_config(name, model.config, tied, ids))
            theirs.load_state_dict(stock_state(folded, tied))
        else:
            from hf.modeling_scale_vectors import ScaleVectorsConfig, ScaleVectorsForCausalLM
            theirs = ScaleVectorsForCausalLM(ScaleVectorsConfig(**vars(model.config), **ids))
            theirs.load_state_dict({f"gpt.{key}": value for key, value in model.state_dict().items()})
            theirs.config.auto_map = {"AutoConfig": "modeling_scale_vectors.ScaleVectorsConfig",
                                      "AutoModelForCausalLM": "modeling_scale_vectors.ScaleVectorsForCausalLM"}
            theirs.config.architectures = ["ScaleVectorsForCausalLM"]
    return theirs.eval(), name, why


def write_code(folder):
    """Our own code beside the weights. transformers wants files of one folder to import each other relatively."""
    for path in (Path(__file__).resolve().parent.parent / name for name in CODE):
        text = path.read_text("utf-8")
        (folder / path.name).write_text(re.sub(r"^from (norms|model) import", r"from .\1 import", text, flags=re.MULTILINE), "utf-8")


def is_known(encoding):
    """False where the data's tokenizer is not known and its text is token ids (data.TokenIds): then no tokenizer is written."""
    return encoding.eot_token is not None


def tiktoken_ranks(encoding):
    """{bytes: id} of every token that the encoding has, the special ones too, so that each keeps its id in a converted tokenizer."""
    return encoding._mergeable_ranks | {name.encode(): i for name, i in encoding._special_tokens.items()}


def write_tokenizer(encoding, folder, max_length):
    """The encoding as transformers' tokenizer, by transformers' own converter. Raises ValueError if a token would get another id."""
    transformers = need("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter
    ranks = tiktoken_ranks(encoding)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "tiktoken"
        file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for token, i in ranks.items()))
        pattern = r"[\s\S]{1,64}" if encoding.name == "bytes" else encoding._pat_str  # (?s:.) is Python's way to say it
        tokenizer = TikTokenConverter(str(file), pattern, extra_special_tokens=list(encoding._special_tokens)).converted()
    end = encoding.decode([encoding.eot_token])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
                                                model_max_length=max_length, clean_up_tokenization_spaces=False)
    check_same_tokens(encoding, fast)
    fast.save_pretrained(folder)


def check_same_tokens(encoding, tokenizer):
    """Raise ValueError if tiktoken's encoding and transformers' tokenizer give other ids for a text with a little of everything."""
    ours, theirs = encoding.encode(PROBE), tokenizer.encode(PROBE, add_special_tokens=False)
    if ours != theirs:
        raise ValueError(f"the tokenizer of the Hugging Face folder gives other ids than {encoding.name!r}: "
                         f"{theirs[:5]}... where that gives {ours[:5]}...")


def last_evaluation(run, step):
    """The last eval event of a run's log, up to a checkpoint's step, or None."""
    path = Path(run) / "log.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a crash may have cut a line
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") == "eval" and isinstance(event.get("step"), int) and event["step"] <= step:
                return event
    return None


def read_keys(path):
    """A run's config.json as a dict. Raises ValueError, one line, if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(keys := json.loads(path.read_text("utf-8")), dict):
            return keys
    raise ValueError(f"{path} is not a run's configuration: export the run from where it is whole")


def commit():
    """The repository's commit, with a note if files differ from it; None where there is no git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + (" (with changes)" if changed else "")


def strategy(c):
    """One line on the scale vectors of a GPTConfig."""
    if not c.scale_vectors:
        return "none: normalizations only"
    return ", ".join(f"{key}={getattr(c, key)}" for key in ("scale_heterogeneous", "scale_placement", "scale_placement_on",
                                                              "scale_reparam"))


def model_card(run, model, keys, step, encoding, name, why):
    """The text of README.md. keys: the run's config.json."""
    c, event = model.config, last_evaluation(run, step)
    loaded = "" if name else ", trust_remote_code=True"
    facts = {
        "architecture": f"stock `{name}`: {why}" if name else f"our own code, in this folder: {why}",
        "parameters": f"{model.num_params():,} as trained, {model.num_params('scale_vectors'):,} of them in scale vectors",
        "scale vectors": f"{strategy(c)}, scale_weight_decay={keys.get('scale_weight_decay')}",
        "Gemma-style norms": f"qk_norm={c.qk_norm}, post_norm={c.post_norm}",
        "data": f"{keys.get('dataset')}, tokenizer {encoding.name}",
        "vocabulary": f"{c.vocab_size:,} rows, " + (f"{encoding.n_vocab:,} of them tokens; padding was kept, because the softmax is over "
                                                     "all rows" if is_known(encoding) else "token ids without a known tokenizer"),
        "steps": f"{step:,}",
        "tokens": f"{event['tokens']:,}, at the last evaluation (step {event['step']:,})" if event else "not logged",
        "validation loss": f"{event['val_loss']:.4f} nats/token" + (f", {event['val_bpb']:.4f} bits/byte" if event.get("val_bpb") else "")
                           if event and event.get("val_loss") is not None else "not evaluated",
        "optimizer": f"{keys.get('optimizer')}, learning_rate={keys.get('learning_rate')}, weight_decay={keys.get('weight_decay')}",
        "code": f"commit {commit() or 'unknown'} at the export",
    }
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {Path(run).resolve().name}\n\n"
            "A language model trained to study scale vectors (arXiv 2605.26895).\n\n| | |\n| --- | --- |\n"
            + "".join(f"| {key} | {value} |\n" for key, value in facts.items())
            + f"\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained(\".\"{loaded})\n"
            f"tokenizer = AutoTokenizer.from_pretrained(\".\"{loaded})\n```\n\n"
            f"```sh\nlm_eval --model hf --model_args pretrained=.{'' if name else ',trust_remote_code=True'} --tasks lambada_openai\n```\n")


@contextlib.contextmanager
def new_folder(out):
    """A folder beside `out` to write in, which becomes `out` when all is written; on an error it is removed.
    Raises ValueError if `out` already holds something."""
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} already holds something: choose another, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's is for its owner alone
        yield folder
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# ---------------------------------------------------------------------------------------------------------------------
# the two directions

def export_run(run, out, max_shard_size="5GB"):
    """Write the newest checkpoint of `run` as a Hugging Face folder, in float32. Returns what was written and why, one line.
    Raises ValueError or OSError, one line."""
    transformers = need("transformers", "safetensors")[0]
    with new_folder(out) as folder:
        model, encoding, step = load_model(run)
        keys = read_keys(Path(run).expanduser() / "config.json")
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), encoding.eot_token)
        theirs, name, why = transformers_model(model, ids)
        difference = same_logits(model, theirs)
        theirs.config.trained = {"tokenizer": encoding.name, "step": step}
        theirs.generation_config = transformers.GenerationConfig(**ids)
        if is_known(encoding):
            write_tokenizer(encoding, folder, model.config.block_size)
        with quiet(transformers):
            theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        if not name:
            write_code(folder)
        (folder / "README.md").write_text(model_card(run, model, keys, step, encoding, name, why), "utf-8")
    kind = f"a stock {name}" if name else "our own code beside the weights (load with trust_remote_code=True)"
    return f"{out}: {kind}, because {why}; logits as ours to {difference:.1g}"


def import_run(folder, out, argv):
    """Write a run at step 0 whose model is the one in the Hugging Face folder. argv: `[CONFIG] [--key=value ...]` as train.py takes them,
    with the strategy, the dataset and the training; the model's shape is the folder's. Returns the command that continues, and whether
    the function is equal. Raises ValueError or OSError, one line."""
    need("transformers", "safetensors")
    given, fixed = given_keys(argv)
    block_size = given.get("block_size")
    scale = {key: value for key, value in given.items() if key.startswith("scale_") and key not in ("scale_weight_decay", "scale_lr")}
    model, theirs = read_model(folder, {**scale, **({"block_size": block_size} if block_size else {})})
    c = model.config
    shape = shape_keys(read_config(folder), c.block_size, c.tie_embeddings, c.qk_norm)
    for key in shape.keys() & fixed:
        if given[key] != shape[key]:
            raise ValueError(f"--{key}={given[key]} is not the checkpoint's, {shape[key]}: leave it out")
    normalized = {"q", "k"} if theirs.config.model_type in NORMALIZE_QK else set()
    kept = normalized if c.scale_placement == "dual_norm" else set()
    changed = PLACEMENTS[c.scale_placement].output is not None and bool(set(c.placed_maps) - kept)
    difference = None if changed else same_logits(model, theirs)
    out = Path(out).expanduser()
    start = out / "start.py"
    with new_folder(out) as temporary:
        values = {**given, **shape, "out_dir": str(out)}
        (temporary / "start.py").write_text(f"# the model of {str(folder)!r}, to be trained on with --resume\n"
                                            + "".join(f"{key} = {value!r}\n" for key, value in values.items()), "utf-8")
        config = load_config([str(temporary / "start.py")])
        dataset = Dataset(config.dataset, c.block_size, c.vocab_size)
        check_dataset_tokenizer(folder, dataset.tokenizer)
        (temporary / "config.json").write_text(json.dumps(to_dict(config), indent=1), "utf-8")
        save_checkpoint(temporary, 0, {"model": model.state_dict(), "optimizer": {}, "config": to_dict(config), "rng": [], "seconds": 0.0,
                                       "tokenizer": dataset.tokenizer, "data": {"sequences": 0, "train_tokens": dataset.train.tokens}}, 1)
    equal = ("not an equal function: DNP normalizes what the checkpoint does not" if changed
             else f"an equal function: logits differ by {difference:.1g}")
    return f"{out}: step 0, {equal}; continue with\n  python train.py {start} --resume"


def given_keys(argv):
    """({key: value} of a config file and --key=value, the keys from the command line), without those that are import_run's business."""
    files, flags = [a for a in argv if not a.startswith("--")], [a for a in argv if a.startswith("--")]
    if len(files) > 1:
        raise ValueError(f"one config file at most, and here are {len(files)}: {' '.join(files)}")
    values, fixed = (read_config_file(files[0]) if files else {}), {}
    for flag in flags:
        key, given, text = flag[2:].partition("=")
        fixed[key] = parse_value(known_key(key, "the command line"), text if given else "True")
    values = {key: check_type(key, value) for key, value in {**values, **fixed}.items()}
    for key in ("out_dir", "resume"):
        values.pop(key, None)
    return values, set(fixed) & set(values)


def check_dataset_tokenizer(folder, name):
    """Raise ValueError if the dataset's tokenizer and the folder's, where it has one, give other ids."""
    transformers, encoding, tokenizer = need("transformers"), get_encoding(name), None
    with quiet(transformers), contextlib.suppress(Exception):  # none there, or of a kind that needs more packages
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer is None or not is_known(encoding):
        print(f"not checked: whether the dataset's tokenizer, {name!r}, is that of {folder}")
    else:
        check_same_tokens(encoding, tokenizer)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", help="the run folder to export; with --from-hf a config file, if any")
    parser.add_argument("--out", required=True, help="the folder to write; it must not hold anything yet")
    parser.add_argument("--from-hf", metavar="FOLDER", help="read this Hugging Face folder into a run")
    parser.add_argument("--max_shard_size", default="5GB", help="weights above this are cut into several files (default: 5GB)")
    args, rest = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is half-written is removed
    try:
        if args.from_hf:
            print(import_run(args.from_hf, args.out, ([args.run] if args.run else []) + rest))
        elif rest or not args.run:
            raise ValueError(f"{f'{rest[0]} is unknown' if rest else 'which run?'}: python -m hf.export out/run --out exported")
        else:
            print(export_run(args.run, args.out, args.max_shard_size))
    except (ValueError, OSError, RuntimeError) as error:  # the last is torch's
        print(f"error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
