"""
From a Hugging Face folder on disk to our GPT, with an equal function.

  read_model      Llama, Mistral, Qwen3, Gemma 3 or Mixtral -> GPT. A Pre-Norm's γ is multiplied
                  into the maps that read it, so every γ around a map starts at 1, whatever the
                  strategy. A γ that no map can absorb (of Q/K-norm, of norms on outputs) is kept
  load_exported   what hf/export.py wrote -> (GPT, encoding, step), for sample.py
  same_logits     the check at the end of both directions

No code of the folder is run, and nothing is downloaded. A feature that our model does not have is
refused by its name.
"""
import contextlib
import json
from pathlib import Path

import torch

from lib.data import get_encoding
from model import GPT, GPTConfig
from norms import OutputNorm

CUSTOM = "scale_vectors_gpt"  # ScaleVectorsConfig.model_type
READS = ("llama", "mistral", "qwen3", "gemma3_text", "mixtral")
NORMALIZE_QK = ("qwen3", "gemma3_text")
WITHOUT_COUNTERPART = (
    "attention_bias",
    "mlp_bias",
    "use_bidirectional_attention",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


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
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()


def first_line(error):
    """transformers and safetensors raise anything on a damaged file: what it is, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- what can be read ----------------------------------------------------------------------------

def read_config(folder):
    """transformers' configuration of a folder. Raises ValueError if we cannot read such a model."""
    transformers, folder = need("transformers"), Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give a Hugging Face folder on this disk")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if kind not in READS:
            raise ValueError(f"its model_type is {kind!r}, and what can be read is "
                             f"{', '.join(READS)}")
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder} cannot be read: {first_line(error)}") from None


def check_features(c, block_size):
    """The rope_theta of a configuration whose every feature our model has. Raises ValueError with
    the name of the first that it does not have."""
    for key in WITHOUT_COUNTERPART:
        if getattr(c, key, None):
            raise ValueError(f"{key}={getattr(c, key)} has no counterpart in our model")

    activation = getattr(c, "hidden_activation", None) or getattr(c, "hidden_act", None)
    if activation not in ("silu", "swish"):
        raise ValueError(f"the activation {activation!r} has no counterpart in our model, "
                         f"whose MLP is a SwiGLU (silu)")

    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim * c.num_attention_heads != c.hidden_size:
        raise ValueError(f"head_dim={head_dim} x {c.num_attention_heads} heads is not "
                         f"hidden_size={c.hidden_size}, as our model needs it")

    if block_size > c.max_position_embeddings:
        raise ValueError(f"block_size={block_size} is more than the checkpoint's "
                         f"max_position_embeddings={c.max_position_embeddings}")
    layers = set(getattr(c, "layer_types", None) or ["full_attention"])
    check_window(c, layers, block_size)
    return check_rope(c, layers)


def check_window(c, layers, block_size):
    slides = "sliding_attention" in layers or c.model_type in ("mistral", "mixtral")
    window = getattr(c, "sliding_window", None)
    if slides and window and window < block_size:
        raise ValueError(f"sliding_window={window} has no counterpart in our model: give "
                         f"--block_size={window} or less, within which it is full attention")


def check_rope(c, layers):
    ropes = [c.rope_parameters[layer] for layer in layers if layer in c.rope_parameters]
    ropes = ropes or [c.rope_parameters]  # one for all layers
    for rope in ropes:
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type={rope['rope_type']!r} (rope scaling) has no counterpart "
                             f"in our model")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} has no "
                             f"counterpart in our model")
    thetas = {rope["rope_theta"] for rope in ropes}
    if len(thetas) > 1:
        raise ValueError(f"rope_theta differs between layers ({', '.join(map(str, thetas))}): "
                         f"ours is one")
    return ropes[0]["rope_theta"]


def shape_keys(c, block_size, tied, normalizes_qk):
    """GPTConfig's keys of the model's shape, from transformers' configuration. Raises ValueError on
    features that our model does not have."""
    mixture = c.model_type == "mixtral"
    return {
        "block_size": block_size,
        "vocab_size": c.vocab_size,
        "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads,
        "n_kv_head": c.num_key_value_heads,
        "n_embd": c.hidden_size,
        "d_ff": c.intermediate_size,
        "norm_eps": float(c.rms_norm_eps),
        "rope_theta": float(check_features(c, block_size)),
        "tie_embeddings": tied,
        "qk_norm": normalizes_qk,
        "post_norm": c.model_type == "gemma3_text",
        "n_expert": c.num_local_experts if mixture else 0,
        "n_expert_active": c.num_experts_per_tok if mixture else 4,
        "d_expert": c.intermediate_size if mixture else 0,
        "d_shared_expert": 0,
        "n_dense_layer": 0,
    }


# ---- into our model ------------------------------------------------------------------------------

def read_model(folder, keys=None):
    """(our GPT, transformers' model) of a Llama, Mistral, Qwen3, Gemma 3 or Mixtral in `folder`,
    equal in function, in float32. keys: the scale_* keys of the strategy, and a block_size up to
    the checkpoint's. Raises ValueError on features without a counterpart.

    Only DNP on maps that the checkpoint does not normalize changes the function. Q/K-norm becomes
    DNP's norm where the strategy has it on q and k. A tied head stays tied unless the final norm's
    γ, or Gemma's factor on the embedding, makes it another matrix."""
    keys, c = dict(keys or {}), read_config(folder)
    block_size = keys.pop("block_size", None) or c.max_position_embeddings
    keeps_qk_norm = c.model_type in NORMALIZE_QK and not takes_qk_norm(c, keys)
    check_features(c, block_size)

    theirs, state = load_theirs(folder)
    plain = bool((state["model.norm.weight"] == 1).all()) and c.model_type != "gemma3_text"
    tied = bool(c.tie_word_embeddings) and plain
    model = GPT(GPTConfig(**{**keys, **shape_keys(c, block_size, tied, keeps_qk_norm)}))
    with torch.no_grad():
        fill(model, state, c)
    if state:
        raise ValueError(f"{folder}: {sorted(state)[0]} and {len(state) - 1} more tensors have no "
                         f"counterpart in our model")
    return model.eval(), theirs


def takes_qk_norm(c, keys):
    """True if the strategy has DNP on q and k, whose norm is then the checkpoint's Q/K-norm."""
    placed = GPTConfig(**keys).placed_maps
    on = [b for b in "qk" if b in placed and keys.get("scale_placement") == "dual_norm"]
    if len(on) == 1 and c.model_type in NORMALIZE_QK:
        raise ValueError(f"the checkpoint normalizes q and k, and scale_placement_on names only "
                         f"{on[0]}: name both or none")
    return len(on) == 2


def load_theirs(folder):
    """transformers' model in float32, and its tensors by name. Raises ValueError if the file lacks
    some or has others."""
    transformers = need("transformers")
    try:
        with quiet(transformers):
            theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True,
                attn_implementation="sdpa")
    except Exception as error:
        raise ValueError(f"{folder} cannot be read: {first_line(error)}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = sorted(map(str, report[what]))[:3]
            raise ValueError(f"{folder} cannot be read: {what.replace('_', ' ')}: "
                             f"{', '.join(names)}")
    return theirs.eval(), dict(theirs.state_dict())


def fill(model, state, c):
    """Move `state`, transformers' tensors by name, into our model. It is empty if all have a place.
    Gemma stores γ - 1, and multiplies the embedding by √d."""
    gemma = c.model_type == "gemma3_text"

    def take(name):
        return state.pop(f"model.{name}.weight")

    def take_norm(name):
        return take(name) + 1 if gemma else take(name)

    embedding = take("embed_tokens")
    model.embedding.weight.copy_(embedding * c.hidden_size ** 0.5 if gemma else embedding)
    head, gamma = state.pop("lm_head.weight", embedding), take_norm("norm")
    if not model.config.tie_embeddings:
        model.head.weight.copy_(head * gamma)

    for i, layer in enumerate(model.layers):
        p = f"layers.{i}"
        fill_attention(layer.attn, f"{p}.self_attn", take_norm(f"{p}.input_layernorm"), take)
        if c.model_type in NORMALIZE_QK:
            fill_qk_norm(layer.attn, f"{p}.self_attn", c, take_norm)

        if gemma:
            for norm, name in ((layer.attn_post_norm, f"{p}.post_attention_layernorm"),
                               (layer.mlp_post_norm, f"{p}.post_feedforward_layernorm")):
                set_gamma(norm.scale, take_norm(name), name)
        before_mlp = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        fill_mlp(layer, state, f"model.{p}.mlp", take_norm(f"{p}.{before_mlp}"))


def fill_attention(attn, p, gamma, take):
    """Move the four matrices. gamma: the Pre-Norm's, which those that read it absorb."""
    for b in "qkv":
        getattr(attn, b).weight.copy_(take(f"{p}.{b}_proj") * gamma)
    attn.o.weight.copy_(take(f"{p}.o_proj"))


def fill_qk_norm(attn, p, c, take_norm):
    """Move the γ of Q/K-norm, into DNP's γ_a where our model has no Q/K-norm."""
    for b in "qk":
        name, m, norm = f"{p}.{b}_norm", getattr(attn, b), getattr(attn, f"{b}_norm")
        gamma = take_norm(name)
        if b == "q" and c.model_type == "gemma3_text":
            # Gemma divides scores by √query_pre_attn_scalar, and we by √head_dim
            gamma = gamma * (len(gamma) / c.query_pre_attn_scalar) ** 0.5
        if isinstance(norm, OutputNorm):
            set_gamma(norm.scale, gamma, name)
        else:
            set_gamma(m.scale_out, gamma.repeat(len(m.weight) // len(gamma)), name)


def fill_mlp(layer, state, p, gamma):
    """Move the SwiGLU, or the router and experts, whose names start with p. gamma: the Pre-Norm's,
    which those that read it absorb."""
    if layer.moe:
        layer.mlp.router.weight.copy_(state.pop(f"{p}.gate.weight") * gamma)
        gate_up = state.pop(f"{p}.experts.gate_up_proj").chunk(2, dim=1)
        for b, W in zip(("gate", "up"), gate_up):
            getattr(layer.mlp, b).weight.copy_(W * gamma)
        layer.mlp.down.weight.copy_(state.pop(f"{p}.experts.down_proj"))
    else:
        for b in ("gate", "up"):
            getattr(layer.mlp, b).weight.copy_(state.pop(f"{p}.{b}_proj.weight") * gamma)
        layer.mlp.down.weight.copy_(state.pop(f"{p}.down_proj.weight"))


def set_gamma(scale, gamma, name):
    """Give a ScaleVector the value gamma, however it is written: OR with ‖α‖ = √d as at its start
    and β = ‖γ‖/√d, ER with mean(α) = 0. Raises ValueError if it cannot have that value."""
    if scale is None:
        if not (gamma == 1).all():
            raise ValueError(f"{name} is not 1 everywhere, and the strategy has no vector there: "
                             f"set --scale_vectors=True")
    elif scale.reparam == "original":
        rms = gamma.square().mean().sqrt()
        if rms == 0:
            raise ValueError(f"{name} is 0, which scale_reparam='original' cannot start from: "
                             f"choose another")
        scale.beta.fill_(rms)
        scale.alpha.copy_(gamma / rms)
    elif scale.reparam == "exponential":
        if not (gamma > 0).all():
            raise ValueError(f"{name} has entries that are not positive, which "
                             f"scale_reparam='exponential' cannot hold: choose another")
        scale.beta.fill_(gamma.log().mean())
        scale.alpha.copy_(gamma.log() - gamma.log().mean())
    elif scale.reparam == "zero_centered":
        scale.alpha.copy_(gamma - 1)
    elif scale.reparam == "none":
        scale.alpha.copy_(gamma)
    else:
        raise ValueError(f"scale_reparam={scale.reparam!r} cannot start from a checkpoint's {name}"
                         f": add its inverse to set_gamma in hf/from_hf.py")


# ---- what hf/export.py wrote ---------------------------------------------------------------------

def load_exported(folder):
    """(model, encoding, step) of a folder that hf/export.py wrote, stock or with our own code. The
    folder's copy of the code is not run. Raises ValueError if it is damaged or not of that kind."""
    folder = Path(folder)
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, trained = written["model_type"], written["trained"]
        tokenizer, step = str(trained["tokenizer"]), trained["step"]
    except (ValueError, KeyError, TypeError, OSError):
        raise ValueError(f"{folder} was not written by hf/export.py, or its config.json is "
                         f"damaged: export the run again") from None

    need("safetensors", *([] if kind == CUSTOM else ["transformers"]))
    encoding = get_encoding(tokenizer)
    try:
        model = load_own(folder, written) if kind == CUSTOM else read_model(folder)[0]
    except Exception as error:
        line = first_line(error)
        if not line.startswith(str(folder)):
            line = f"{folder} cannot be read: {line}"
        raise ValueError(line) from None
    return model.eval(), encoding, step


def load_own(folder, written):
    """Our GPT from a folder with our own code. written: its config.json. A damaged file raises
    anything."""
    from safetensors.torch import load_file
    model = GPT(GPTConfig(**{key: written[key] for key in vars(GPTConfig()) if key in written}))
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            state[name.removeprefix("gpt.")] = tensor
    if model.config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # its last line is the first that is no heading
        raise ValueError(str(error).splitlines()[-1].strip()) from None
    return model


# ---- the check at the end ------------------------------------------------------------------------

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
