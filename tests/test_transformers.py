"""
Proves the model against public implementations: with its scale vectors folded, the logits equal transformers' Llama, with
Q/K-norm Qwen3, with Gemma's norms Gemma 3's layers, loaded with the same weights. Needs the optional package transformers.
"""
import pytest
import torch
from conftest import randomize_scales, tiny_batch, tiny_gpt

from norms import fold_scale_vectors

transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")


def their_config(kind, config, **extra):
    return kind(vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.d_ff, num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, head_dim=config.head_dim,
                max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
                rope_theta=config.rope_theta, attention_bias=False, **extra)


def load(theirs, model):
    """Copy a folded model's weights over; what γ remains goes where the public model has one, ones elsewhere."""
    ones = torch.ones(model.config.n_embd)
    state = {"model.embed_tokens.weight": model.embedding.weight, "lm_head.weight": model.head.weight["head"],
             "model.norm.weight": model.head.scale_in["head"]() if model.head.scale_in else ones}
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        weights = {**layer.attn.qkv.weight, **layer.attn.o.weight, **layer.mlp.gate_up.weight, **layer.mlp.down.weight}
        part = {name: "mlp" if name in ("gate", "up", "down") else "self_attn" for name in weights}
        state |= {f"{prefix}.{part[name]}.{name}_proj.weight": W for name, W in weights.items()}
        state |= {f"{prefix}.input_layernorm.weight": ones, f"{prefix}.post_attention_layernorm.weight": ones}
        if model.config.qk_norm:
            state |= {f"{prefix}.self_attn.{name}_norm.weight": getattr(layer.attn, f"{name}_norm").scale() for name in "qk"}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("keys", [{}, {"n_kv_head": 4, "rope_theta": 500.0}, {"tie_embeddings": True},
                                  {"scale_placement": "after", "scale_reparam": "original"},
                                  {"scale_heterogeneous": True, "scale_placement": "dual", "scale_reparam": "exponential",
                                   "scale_placement_on": "q,k,v,gate,up,head,o,down"}], ids=str)
def test_llama(keys):
    model, idx = randomize_scales(tiny_gpt(**keys)), tiny_batch()[0]
    theirs = transformers.LlamaForCausalLM(their_config(transformers.LlamaConfig, model.config))
    with torch.no_grad():
        torch.testing.assert_close(load(theirs, fold_scale_vectors(model))(idx).logits, model(idx)[0], rtol=0, atol=1e-5)


def test_qwen3():
    model, idx = randomize_scales(tiny_gpt(qk_norm=True, scale_heterogeneous=True, scale_reparam="original")), tiny_batch()[0]
    theirs = transformers.Qwen3ForCausalLM(their_config(transformers.Qwen3Config, model.config, use_sliding_window=False))
    with torch.no_grad():
        torch.testing.assert_close(load(theirs, fold_scale_vectors(model))(idx).logits, model(idx)[0], rtol=0, atol=1e-5)


def test_gemma_norms():
    """Pre-Norm, Q/K-norm and norms on the outputs of attention and FFN, as Gemma 3 has them: its text model, with silu for its gelu,
    its embedding's factor √d and its γ = 1 + w taken out."""
    keys = dict(qk_norm=True, post_norm=True, scale_heterogeneous=True)
    for reparam in ("original", "zero_centered"):
        model, idx = randomize_scales(tiny_gpt(**keys, scale_reparam=reparam)), tiny_batch()[0]
        folded, C = fold_scale_vectors(model), 32
        config = transformers.Gemma3TextConfig(
            **{k: v for k, v in their_config(dict, model.config).items() if k != "rope_theta"}, hidden_activation="silu",
            query_pre_attn_scalar=model.config.head_dim, layer_types=["full_attention"] * 2,
            rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": model.config.rope_theta}})
        theirs = transformers.Gemma3ForCausalLM(config).eval()
        state = {"model.embed_tokens.weight": folded.embedding.weight / C ** 0.5, "lm_head.weight": folded.head.weight["head"],
                 "model.norm.weight": torch.zeros(C)}
        for i, layer in enumerate(folded.layers):
            p = f"model.layers.{i}"
            state |= {f"{p}.self_attn.{b}_proj.weight": W for b, W in {**layer.attn.qkv.weight, **layer.attn.o.weight}.items()}
            state |= {f"{p}.mlp.{b}_proj.weight": W for b, W in {**layer.mlp.gate_up.weight, **layer.mlp.down.weight}.items()}
            state |= {f"{p}.input_layernorm.weight": torch.zeros(C), f"{p}.pre_feedforward_layernorm.weight": torch.zeros(C),
                      f"{p}.self_attn.q_norm.weight": layer.attn.q_norm.scale() - 1,
                      f"{p}.self_attn.k_norm.weight": layer.attn.k_norm.scale() - 1,
                      f"{p}.post_attention_layernorm.weight": layer.attn_post_norm.scale() - 1,
                      f"{p}.post_feedforward_layernorm.weight": layer.mlp_post_norm.scale() - 1}
        theirs.load_state_dict(state, strict=True)
        with torch.no_grad():
            torch.testing.assert_close(theirs(idx).logits, model(idx)[0], rtol=0, atol=1e-5)
