"""
A trained GPT as transformers loads it: from_pretrained(folder, trust_remote_code=True).

hf/export.py puts this file, model.py and norms.py into the folder of a model that no class of
transformers computes. It adds no mathematics: ScaleVectorsForCausalLM hands ids to model.GPT and
returns its logits. Needs transformers 5.

  - AutoModelForCausalLM and AutoModel both give this class. There is no model without a head,
    because under DNP the head reads the residual stream itself: ask `model.gpt` for its parts
  - padding, left or right, is named by attention_mask, as tokenizers give it
  - generate caches keys and values. A batch with padding is read again for each token instead, with
    the same result
  - labels: the loss is transformers' (shifted, -100 ignored). In training a mixture's auxiliary
    losses are added
"""
from dataclasses import fields

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model import GPT, GPTConfig, rope_tables

KEYS = [f.name for f in fields(GPTConfig)]
# transformers has renamed what generate calls its cache
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class ScaleVectorsConfig(PreTrainedConfig):
    """GPTConfig's keys as attributes, also under transformers' names where it has one."""
    model_type = "scale_vectors_gpt"
    attribute_map = {
        "hidden_size": "n_embd",
        "intermediate_size": "d_ff",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "block_size",
    }

    def __init__(self, **kwargs):
        config = GPTConfig(**{key: kwargs.pop(key) for key in KEYS if key in kwargs})
        for key in KEYS:
            setattr(self, key, getattr(config, key))
        super().__init__(**{**kwargs, "tie_word_embeddings": config.tie_embeddings})

    def gpt_config(self):
        return GPTConfig(**{key: getattr(self, key) for key in KEYS})


class ScaleVectorsForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ScaleVectorsConfig
    _tied_weights_keys = {"gpt.head.weight": "gpt.embedding.weight"}
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config.gpt_config())
        self.post_init()

    def _init_weights(self, module):
        """transformers builds a model without memory. Parameters come from the file, and constants
        that are in no file come from here."""
        if isinstance(module, GPT):
            for name, table in zip(("cos", "sin"), rope_tables(module.config)):
                getattr(module, name).copy_(table)

    def get_input_embeddings(self):
        return self.gpt.embedding

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """What forward reads for the next token: the ids that the cache has not seen, or all of
        them if there is padding or no cache."""
        cache = cache_in(kwargs)
        if cache is None or has_padding(attention_mask):
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        return {"input_ids": input_ids[:, cache.get_seq_length():], CACHE: cache}

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None,
                return_dict=True, **kwargs):
        """input_ids (B, T) -> CausalLMOutputWithPast with logits (B, T, V). attention_mask (B, T)
        is 0 where there is padding, before or after a row's tokens. With a cache, input_ids are
        those that follow it. Raises ValueError on inputs that it cannot compute with."""
        cache = cache_in(kwargs)
        if input_ids is None:
            raise ValueError("this model reads input_ids: inputs_embeds cannot be used")
        if cache is not None and has_padding(attention_mask):
            raise ValueError("a cache and a padded attention_mask cannot be used together: "
                             "leave the cache out")

        if cache is not None:
            logits = self.with_cache(input_ids, cache)
        elif has_padding(attention_mask):
            logits = self.with_padding(input_ids, attention_mask)
        else:
            logits = self.gpt(input_ids)[0]

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.size(-1))
            if self.training:
                loss = loss + self.gpt.auxiliary_loss()
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output if return_dict else output.to_tuple()

    def with_padding(self, input_ids, attention_mask):
        """Logits of a padded batch: rows are rotated, computed, and rotated back."""
        forth, back = rotations(attention_mask)
        logits = self.gpt(input_ids.gather(1, forth))[0]
        return logits.gather(1, back.unsqueeze(-1).expand(-1, -1, logits.size(-1)))

    def with_cache(self, input_ids, cache):
        """Logits of input_ids (B, T), whose keys and values are added to transformers' cache: all
        at once to an empty one, else one position at a time, as model.Attention needs it."""
        logits = []
        for piece in input_ids.split(1, dim=1) if cache.get_seq_length() else [input_ids]:
            seen = cache.get_seq_length()
            caches = [[] for _ in range(self.config.n_layer)]
            if seen:
                for ours, theirs in zip(caches, cache.layers):
                    ours += [theirs.keys[:, :, :seen], theirs.values[:, :, :seen]]

            logits.append(self.gpt(piece, caches=caches)[0])
            for i, (keys, values) in enumerate(caches):
                cache.update(keys[:, :, seen:], values[:, :, seen:], i)
        return torch.cat(logits, dim=1)


def cache_in(kwargs):
    return kwargs.get("cache", kwargs.get("past_key_values"))


def has_padding(attention_mask):
    return attention_mask is not None and not attention_mask.all()


def rotations(attention_mask):
    """Indices (B, T) that rotate each row so that its padding comes last, where no token of a
    causal model sees it, and those that rotate it back. Raises ValueError if padding stands
    between tokens."""
    mask = attention_mask.long()
    starts = mask.diff(dim=1, prepend=mask.new_zeros(len(mask), 1)) == 1
    if (starts.sum(1) > 1).any():
        raise ValueError("attention_mask has padding between tokens: put it before or after them")
    first = mask.argmax(1, keepdim=True)
    position = torch.arange(mask.size(1), device=mask.device)
    return (position + first) % mask.size(1), (position - first) % mask.size(1)
