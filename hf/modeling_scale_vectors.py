"""
A trained GPT as transformers loads it: from_pretrained(folder, trust_remote_code=True).

hf/export.py puts this file, model.py, norms.py and fast.py into the folder of a model that no class
of transformers computes. It adds no mathematics: ScaleVectorsForCausalLM hands ids to model.GPT and
returns its logits. Needs transformers 5.

  - AutoModelForCausalLM and AutoModel both give this class. There is no model without a head,
    because under DNP the head reads the residual stream itself: ask `model.gpt` for its parts
  - padding, left or right, is named by attention_mask, as tokenizers give it
  - generate caches keys and values, in a dynamic or a static cache. A batch with padding is read
    again for each token instead, with the same result
  - labels: the loss is transformers' (shifted, -100 ignored; with num_items_in_batch, as Trainer
    gives it, a sum over that number). In training a mixture's auxiliary losses are added
  - what would change the result and cannot be done is refused by its name
"""
from dataclasses import fields

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.0 copies only what this file itself imports
from fast import Routing  # noqa: F401
from model import GPT, GPTConfig
from norms import ScaleVector  # noqa: F401

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
    _no_split_modules = ["GPT"]  # each forward pass computes all scale vectors as one batch
    _supports_sdpa = True  # there is no other attention
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # so Trainer gives num_items_in_batch

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(config.gpt_config())
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module):
        """transformers builds a model without memory. What no file has comes from here: constants,
        and parameters that are missing. It keeps torch's functions from touching the others."""
        if isinstance(module, GPT):
            module.init_weights()

    def get_input_embeddings(self):
        return self.gpt.embedding

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """Raises ValueError on another number: the head has a row for each token, with its own γ_a,
        and DNP normalizes over all of them."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(f"resize_token_embeddings({new_num_tokens}) cannot be done: the model "
                             f"was trained with vocab_size={self.config.vocab_size}; train one "
                             f"with another")
        return self.gpt.embedding

    def _set_gradient_checkpointing(self, enable=True, **_):
        """Blocks are run again in the backward pass; how often is GPTConfig's recompute."""
        self.gradient_checkpointing = self.gpt.config.recompute = enable

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None,
                                      cache_position=None, attention_mask=None, use_cache=None,
                                      **kwargs):
        """What forward reads for the next token: the ids that the cache has not seen, or all of
        them if there is padding or no cache. Their number comes as next_sequence_length, or by
        early versions 5 as the length of cache_position."""
        cache = cache_in(kwargs)
        check_known({name: kwargs[name] for name in kwargs if name.startswith("output_")})
        if has_padding(attention_mask):
            return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if cache_position is not None:
            next_sequence_length = len(cache_position)
        if cache is not None and next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {"input_ids": input_ids, CACHE: cache, "use_cache": use_cache}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None,
                use_cache=None, return_dict=None, num_items_in_batch=None, **kwargs):
        """input_ids (B, T) -> CausalLMOutputWithPast with logits (B, T, V). attention_mask (B, T)
        is 0 where there is padding, before or after a row's tokens. With a cache, input_ids are
        those that follow it. Raises ValueError on inputs that it cannot compute with."""
        cache = cache_in(kwargs)
        check_known(kwargs)
        check_one_device(self)
        padded = has_padding(attention_mask)
        if input_ids is None:
            raise ValueError("this model reads input_ids, and there are none")
        if padded and (use_cache or cache is not None):
            raise ValueError("a cache and a padded attention_mask cannot be used together: "
                             "leave the cache out")
        check_positions(position_ids, attention_mask, input_ids, seen_by(cache))

        if use_cache is None:  # as transformers' own models do
            use_cache = getattr(self.config, "use_cache", True) and not (self.training or padded)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            logits = self.with_cache(input_ids, cache)
        elif padded:
            logits = self.with_padding(input_ids, attention_mask)
        else:
            logits = self.gpt(input_ids)[0]

        loss = None
        if labels is not None:
            loss = self.loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def loss(self, logits, labels, num_items_in_batch=None):
        """The mean cross-entropy, or this micro-batch's part of the mean over num_items_in_batch
        labels. Auxiliary losses are weighted by the same share, so that those of all micro-batches
        make one mean."""
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.size(-1),
                                  num_items_in_batch=num_items_in_batch)
        if self.training:
            share = 1.0
            if num_items_in_batch is not None:
                share = (labels[:, 1:] != -100).sum() / num_items_in_batch
            loss = loss + share * self.gpt.auxiliary_loss()
        return loss

    def with_padding(self, input_ids, attention_mask):
        """Logits of a padded batch: rows are rotated, computed, and rotated back."""
        forth, back = rotations(attention_mask)
        logits = self.gpt(input_ids.gather(1, forth))[0]
        return logits.gather(1, back.unsqueeze(-1).expand(-1, -1, logits.size(-1)))

    def with_cache(self, input_ids, cache):
        """Logits of input_ids (B, T), whose keys and values are added to transformers' cache: all
        at once to an empty one, else one position at a time, as model.Attention needs it."""
        logits = []
        for piece in input_ids.split(1, dim=1) if seen_by(cache) else [input_ids]:
            seen = seen_by(cache)
            caches = [[] for _ in range(self.config.n_layer)]
            if seen:
                for ours, theirs in zip(caches, cache.layers):
                    ours += [theirs.keys[:, :, :seen], theirs.values[:, :, :seen]]

            logits.append(self.gpt(piece, caches=caches)[0])
            place = {"cache_position": torch.arange(seen, seen + piece.size(1)).to(piece.device)}
            for i, (keys, values) in enumerate(caches):  # early versions 5 need to be told where
                cache.update(keys[:, :, seen:], values[:, :, seen:], i, place)
        return torch.cat(logits, dim=1)


# ---- what can be computed with -------------------------------------------------------------------

def cache_in(kwargs):
    """transformers' cache, taken out of the arguments; None if there is none. Raises ValueError
    on a kind that cannot be used."""
    for name in ("cache", "past_key_values"):
        cache = kwargs.pop(name, None)
        if cache is not None:  # an empty one counts as False
            check_cache(cache)
            return cache
    return None


def seen_by(cache):
    """How many positions a cache holds. A static one counts in a tensor that changes later."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache(cache):
    """Raise ValueError unless the cache holds all keys and values as they are, on this device."""
    kinds = {"DynamicLayer", "StaticLayer"}
    others = [type(layer).__name__ for layer in getattr(cache, "layers", [])]
    others = [name for name in others if name not in kinds]
    if not isinstance(cache, Cache):
        others = [type(cache).__name__]
    if getattr(cache, "offloading", False):
        others = [f"offloaded {type(cache).__name__}"]
    if others:
        raise ValueError(f"a cache of the kind {others[0]} cannot be used: give a DynamicCache or "
                         f"a StaticCache")


def check_known(kwargs):
    """Raise ValueError with the name of an argument that this model would leave out."""
    for name, value in kwargs.items():
        if torch.is_tensor(value) or value:
            raise ValueError(f"{name} has no effect on this model: leave it out. (Parts of the "
                             f"model, such as model.gpt.layers, can be hooked.)")


def check_one_device(model):
    """Raise ValueError if device_map has put parts of the model on several devices."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1 or "disk" in places:
        raise ValueError(f"this model runs on one device, and device_map has put it on "
                         f"{', '.join(sorted(map(str, places)))}: give device_map={{'': 0}}")


def check_positions(position_ids, attention_mask, input_ids, seen):
    """Raise ValueError unless attention_mask covers the `seen` positions in the cache and
    input_ids, and position_ids count the tokens of each row: packed sequences cannot be used."""
    B, T = input_ids.shape
    mask = attention_mask
    if mask is None:
        mask = torch.ones(B, seen + T, dtype=torch.long, device=input_ids.device)
    if mask.shape != (B, seen + T):
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)}, and "
                         f"{(B, seen + T)} is needed")
    if position_ids is not None:
        expected = (mask.long().cumsum(1) - 1)[:, seen:]
        if ((position_ids != expected) & (mask[:, seen:] != 0)).any():
            raise ValueError("position_ids other than 0, 1, 2, ... in each row, as of packed "
                             "sequences, cannot be used: give each sequence a row of its own")


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
