"""
A trained model for other people's tools: a run becomes a Hugging Face folder.

  python -m hf.export out/quickstart --out exported

Scale vectors that a weight can absorb are folded away. If nothing of ours is left, the folder is a
stock Llama, Qwen3 or Mixtral. Otherwise it holds our norms.py, fast.py and model.py beside the
weights, for trust_remote_code=True. The logits are the same either way.

  stock_architecture   which of the two, and why
  stock_state          our weights by transformers' names
  write_tokenizer      tiktoken's encoding, by transformers' converter
  same_logits          the check at the end, and that of cached tokens, check_cache
  export_run           all of it. The folder appears whole or not at all
"""
import argparse
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from lib.count import linears
from norms import PLACEMENTS, fold_scale_vectors, named_scale_vectors
from sample import load_model, show

ROOT = Path(__file__).resolve().parent.parent
CODE = ("hf/modeling_scale_vectors.py", "model.py", "norms.py", "fast.py")
AUTO_MAP = {
    "AutoConfig": "modeling_scale_vectors.ScaleVectorsConfig",
    "AutoModel": "modeling_scale_vectors.ScaleVectorsForCausalLM",
    "AutoModelForCausalLM": "modeling_scale_vectors.ScaleVectorsForCausalLM",
}
# two tokenizers that differ anywhere are likely to differ on this
PROBE = "def f(x):\n    return x + 1  # The café's 3 naïve tests, №42:\n\n\t'don’t'\r\n"
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A language model trained to study scale vectors (arXiv 2605.26895), after {step:,} steps. It is
{kind}, because {why}.

- scale vectors: {strategy}
- data: {dataset}, tokenizer {tokenizer}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
```
"""


# ---- transformers, an optional package -----------------------------------------------------------

def need(*packages):
    """Import optional packages. Raises ValueError with pip's command if one is missing."""
    try:
        modules = [__import__(package) for package in packages]
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: "
                         f"pip install -r requirements-extra.txt") from None
    if "transformers" in packages:
        version = modules[packages.index("transformers")].__version__
        if int(version.split(".")[0]) < 5:
            raise ValueError(f"transformers {version} is too old: pip install 'transformers>=5'")
    return modules[0] if len(modules) == 1 else modules


@contextlib.contextmanager
def quiet(transformers):
    """transformers' progress bars and warnings, off for a while."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# ---- a stock class, or our own code --------------------------------------------------------------

def stock_architecture(model):
    """(name, why): the class of transformers that computes the same function as this folded GPT, or
    None, and the reason. A fork that computes something new returns None and its reason here."""
    c = model.config
    if reason := why_not_stock(model):
        return None, reason
    if c.n_expert:
        return "MixtralForCausalLM", "every scale vector folds into a weight"
    if c.qk_norm or normalized_maps(c):
        return "Qwen3ForCausalLM", ("q and k are normalized, and every other scale vector folds "
                                    "into a weight")
    return "LlamaForCausalLM", "every scale vector folds into a weight"


def why_not_stock(model):
    """The reason why no class of transformers computes this folded GPT, or None."""
    c = model.config
    if name := unknown_parameter(model):
        return f"no class of transformers has the parameter {name}"
    if c.post_norm:
        return "post_norm normalizes each sub-layer's output"
    return why_not_stock_placement(model) or (c.n_expert and why_not_mixtral(c)) or None


def unknown_parameter(model):
    """The name of the first parameter that belongs neither to a map nor to a scale vector."""
    known = {model.embedding.weight, *(m.weight for m in linears(model))}
    for _, vector in named_scale_vectors(model):
        known.update(vector.parameters())
    return next((name for name, p in model.named_parameters() if p not in known), None)


def normalized_maps(c):
    """The maps whose output the placement changes: DNP's norm, or whatever a fork's entry does."""
    return [] if PLACEMENTS[c.scale_placement].output is None else c.placed_maps


def why_not_stock_placement(model):
    c = model.config
    normalized = normalized_maps(c)
    if not normalized:
        return None
    if not PLACEMENTS[c.scale_placement].divides_by_rms:
        return f"scale_placement={c.scale_placement!r} is not a linear map"
    if others := [name for name in normalized if name not in ("q", "k")]:
        return f"DNP normalizes the output of {', '.join(others)}"
    if len(normalized) == 1:
        return f"DNP normalizes only {normalized[0]}, and Qwen3 normalizes q and k"
    if not all(same_for_all_heads(layer.attn, c.head_dim) for layer in model.layers):
        return "DNP's γ_a differs from head to head, and Qwen3's is one for all heads"
    return None


def why_not_mixtral(c):
    if c.d_shared_expert:
        return "Mixtral has no shared expert"
    if c.n_dense_layer:
        return "Mixtral has no dense layers"
    if c.qk_norm or normalized_maps(c):
        return "Mixtral has no Q/K-norm"
    if c.d_expert % 8 or c.n_embd % 8:
        return (f"transformers' Mixtral needs multiples of 8, and d_expert={c.d_expert}, "
                f"n_embd={c.n_embd}")
    return None


def same_for_all_heads(attn, head_dim):
    """True if the vectors γ_a of q and k, where there are any, repeat one (head_dim,) vector."""
    for m in (attn.q, attn.k):
        if m.scale_out:
            heads = m.scale_out().unflatten(0, (-1, head_dim))
            if not torch.equal(heads, heads[:1].expand_as(heads)):
                return False
    return True


# ---- a stock class: its configuration and its tensors --------------------------------------------

def stock_config(name, c, tied, ids):
    """The configuration of the transformers class `name` for our GPTConfig."""
    keys = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "intermediate_size": c.d_expert if c.n_expert else c.d_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.block_size,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": tied,
    }
    if c.n_expert:
        keys |= {
            "num_local_experts": c.n_expert,
            "num_experts_per_tok": c.n_expert_active,
            "router_aux_loss_coef": c.load_balance_coef,
        }
    return getattr(need("transformers"), name).config_class(**keys, **ids)


def stock_state(model, tied):
    """The tensors of a folded GPT by transformers' names. A γ that remains goes where they have
    one; their other γ are 1. A tied head with γ_a becomes a matrix of its own, diag(γ_a) W."""
    W = model.head.effective_weight()
    norm = torch.ones(model.config.n_embd)
    if model.norm.scale:
        norm = model.norm.scale()
    state = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": norm,
        "lm_head.weight": W if tied else W.clone(),
    }
    for i, layer in enumerate(model.layers):
        for name, tensor in stock_layer(layer, model.config).items():
            state[f"model.layers.{i}.{name}"] = tensor
    return state


def stock_layer(layer, c):
    attn, mlp = layer.attn, layer.mlp
    state = {
        "input_layernorm.weight": torch.ones(c.n_embd),
        "post_attention_layernorm.weight": torch.ones(c.n_embd),
    }
    for b in "qkvo":
        state[f"self_attn.{b}_proj.weight"] = getattr(attn, b).weight
    if c.qk_norm or normalized_maps(c):
        for b in "qk":
            state[f"self_attn.{b}_norm.weight"] = head_norm(attn, b, c)

    if layer.moe:
        state["mlp.gate.weight"] = mlp.router.weight
        gate_up = torch.cat((mlp.gate.weight, mlp.up.weight), dim=1)
        state["mlp.experts.gate_up_proj"] = gate_up
        state["mlp.experts.down_proj"] = mlp.down.weight
    else:
        for b in ("gate", "up", "down"):
            state[f"mlp.{b}_proj.weight"] = getattr(mlp, b).weight
    return state


def head_norm(attn, b, c):
    """γ (head_dim,) of Q/K-norm, or of DNP on q or k when all heads have the same."""
    scale = getattr(attn, f"{b}_norm").scale if c.qk_norm else getattr(attn, b).scale_out
    return torch.ones(c.head_dim) if scale is None else scale()[:c.head_dim]


# ---- the model and its code ----------------------------------------------------------------------

@torch.no_grad()
def transformers_model(model, ids):
    """(transformers' model with our GPT's function, its stock class or None, why)."""
    transformers = need("transformers", "safetensors")[0]
    folded = fold_scale_vectors(model)
    name, why = stock_architecture(folded)
    with quiet(transformers):
        if name:
            head = folded.head
            tied = head.tied and torch.equal(head.effective_weight(), head.weight)
            config = stock_config(name, model.config, tied, ids)
            theirs = getattr(transformers, name)(config)
            theirs.load_state_dict(stock_state(folded, tied))
        else:
            theirs = own_model(model, ids)
    return theirs.eval(), name, why


def own_model(model, ids):
    from hf.modeling_scale_vectors import ScaleVectorsConfig, ScaleVectorsForCausalLM
    theirs = ScaleVectorsForCausalLM(ScaleVectorsConfig(**vars(model.config), **ids))
    theirs.load_state_dict({f"gpt.{key}": value for key, value in model.state_dict().items()})
    theirs.config.auto_map = AUTO_MAP
    theirs.config.architectures = ["ScaleVectorsForCausalLM"]
    return theirs


def write_code(folder):
    """Copy our own code beside the weights. transformers wants its imports to be relative."""
    for name in CODE:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^from (norms|fast|model) import", r"from .\1 import", text, flags=re.M)
        (folder / path.name).write_text(text, encoding="utf-8")


# ---- the tokenizer -------------------------------------------------------------------------------

def tiktoken_ranks(encoding):
    """{bytes: id} of every token, with the special ones, so that each keeps its id."""
    special = {name.encode(): i for name, i in encoding._special_tokens.items()}
    return encoding._mergeable_ranks | special


@contextlib.contextmanager
def without_cache():
    """Within it tiktoken keeps no copy of what it reads: the converter reads our temporary file
    through it, and the cache may be read-only."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        yield
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        os.environ.update({} if before is None else {"TIKTOKEN_CACHE_DIR": before})


def write_tokenizer(encoding, folder, max_length):
    """Write the encoding as transformers' tokenizer, by transformers' own converter. Raises
    ValueError if a token would get another id."""
    transformers = need("transformers")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    # tiktoken's pattern of bytes has Python's (?s:.), which the converter cannot read
    pattern = r"[\s\S]{1,64}" if encoding.name == "bytes" else encoding._pat_str
    special = list(encoding._special_tokens)
    with tempfile.TemporaryDirectory() as temporary, without_cache():
        file = Path(temporary) / "tiktoken"
        file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i)
                                  for token, i in tiktoken_ranks(encoding).items()))
        converter = TikTokenConverter(str(file), pattern, extra_special_tokens=special)
        tokenizer = converter.converted()

    end = encoding.decode([encoding.eot_token])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
        padding_side="left",  # a generated text continues a row at its right end
        model_input_names=["input_ids", "attention_mask"], model_max_length=max_length,
        clean_up_tokenization_spaces=False)
    check_same_tokens(encoding, fast)
    with inside(folder):
        fast.save_pretrained(".")


def check_same_tokens(encoding, tokenizer):
    """Raise ValueError if tiktoken's encoding and transformers' tokenizer give other ids for
    PROBE, a text with a little of everything."""
    ours = encoding.encode(PROBE)
    with quiet(need("transformers")):  # PROBE may be longer than the model's context
        theirs = tokenizer.encode(PROBE, add_special_tokens=False)
    if ours != theirs:
        raise ValueError(f"transformers' conversion of the tokenizer {encoding.name!r} gives other "
                         f"ids: {theirs[:5]}... where tiktoken gives {ours[:5]}...")


# ---- from a run to a folder ----------------------------------------------------------------------

@torch.no_grad()
def same_logits(ours, theirs):
    """The largest difference of the two models' logits on random ids. Raises ValueError if it is
    more than rounding: 1e-5 of the largest logit, and as much again for each layer."""
    c = ours.config
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(c.vocab_size, (2, min(32, c.block_size)), generator=generator)
    logits = ours(idx)[0]
    difference = (logits - theirs(idx).logits).abs().max().item()
    if not difference <= 1e-5 * (1 + c.n_layer) * max(1.0, logits.abs().max().item()):
        raise ValueError(f"the two models' logits differ by {difference:.2g}: they are not the "
                         f"same function. What model.py or norms.py has and hf/export.py does not "
                         f"know needs a clause in stock_architecture")
    return difference


@torch.no_grad()
def check_cache(theirs):
    """Raise ValueError if a token that is generated greedily with a cache is not the likeliest
    without one, up to rounding."""
    c = theirs.config
    idx = torch.randint(c.vocab_size, (2, 1), generator=torch.Generator().manual_seed(1))
    tokens = theirs.generate(
        input_ids=idx, do_sample=False, use_cache=True, eos_token_id=c.vocab_size,  # so never
        max_new_tokens=min(16, c.max_position_embeddings - 1))
    logits = theirs(tokens[:, :-1]).logits
    short = logits.amax(-1) - logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    if not short.max() <= 1e-4 * (1 + logits.abs().max()):
        raise ValueError("with cached keys and values the model generates other tokens than without"
                         ": does what model.py adds know the position of a token after others?")


@contextlib.contextmanager
def new_folder(out):
    """A folder beside `out` to write in. It becomes `out` when all is written, and is removed on an
    error. Raises ValueError if `out` already holds something."""
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} already holds something: choose another, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.name}.{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def inside(folder):
    """Work in `folder` for a while. safetensors and tokenizers take every path for UTF-8, which it
    is not in every locale, but "." always is."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def export_run(run, out, max_shard_size="5GB"):
    """Write the newest checkpoint of `run` as a Hugging Face folder, in float32. Returns one line:
    what was written, and why. Raises ValueError or OSError."""
    transformers = need("transformers", "safetensors")[0]
    with new_folder(out) as folder:
        model, encoding, step = load_model(run)
        keys = read_keys(Path(run).expanduser() / "config.json")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = dict.fromkeys(names, encoding.eot_token)

        theirs, name, why = transformers_model(model, ids)
        difference = same_logits(model, theirs)
        check_cache(theirs)
        theirs.config.trained = {"tokenizer": encoding.name, "step": step}
        theirs.generation_config = transformers.GenerationConfig(**ids)

        if encoding.eot_token is not None:  # else its text is token ids of an unknown tokenizer
            write_tokenizer(encoding, folder, model.config.block_size)
        with quiet(transformers), inside(folder):
            theirs.save_pretrained(".", max_shard_size=max_shard_size)
        if not name:
            write_code(folder)
        card = model_card(run, keys, model, encoding, step, name, why)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
        for path in folder.iterdir():  # safetensors makes files that only their owner can read
            shutil.copymode(folder / "README.md", path)

    own = "our own code beside the weights (load with trust_remote_code=True)"
    kind = f"a stock {name}" if name else own
    return f"{out}: {kind}, because {why}; logits as ours to {difference:.1g}"


def read_keys(path):
    """A run's config.json as a dict. Raises ValueError if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        keys = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(keys, dict):
            return keys
    raise ValueError(f"{path} is not a run's configuration: export the run from where it is whole")


def model_card(run, keys, model, encoding, step, name, why):
    """The text of README.md. keys: the run's config.json; name: the stock class, or None."""
    c, strategy = model.config, "none: normalizations only"
    if c.scale_vectors:
        strategy = ", ".join(f"{key}={value}" for key, value in vars(c).items()
                             if key.startswith("scale_") and key != "scale_vectors")
        strategy += f", scale_weight_decay={keys.get('scale_weight_decay')}"
    kind, trust = f"a stock `{name}`", ""
    if name is None:
        kind, trust = "of our own code, in this folder", ", trust_remote_code=True"
    return CARD.format(title=Path(run).resolve().name, step=step, kind=kind, why=why, trust=trust,
                       strategy=strategy, dataset=keys.get("dataset"), tokenizer=encoding.name)


# ---- the command line ----------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m hf.export", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="the run folder to export")
    parser.add_argument("--out", required=True,
                        help="the folder to write; it must not hold anything yet")
    parser.add_argument("--max_shard_size", default="5GB",
                        help="larger weights are cut into several files (default: 5GB)")
    args, rest = parser.parse_known_args(argv)
    usage = "python -m hf.export out/run --out exported"
    if rest:
        raise ValueError(f"{rest[0]} is unknown: {usage}")
    if not args.run:
        raise ValueError(f"the run to export is missing: {usage}")
    return args


def main(argv):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        args = parse(argv)
        show(export_run(args.run, args.out, args.max_shard_size) + "\n")
    except (ValueError, OSError, RuntimeError) as error:  # the last is torch's
        print(f"error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
