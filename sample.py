"""
Generate text from a trained model.

  python sample.py --out_dir=out/quickstart --prompt="def " --temperature=0.8 --top_k=50
"""
import argparse
import codecs
import dataclasses
import os
import sys

import torch

from lib.checkpoint import load_weights, newest_checkpoint
from lib.data import get_encoding
from lib.output import encodable, say
from model import GPT, GPTConfig


def load_model(out_dir):
    """(model, encoding, step) of the newest whole checkpoint in out_dir."""
    out_dir = os.path.expanduser(out_dir)
    found = newest_checkpoint(out_dir, sys.stderr)
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {out_dir}: train first (python train.py "
                                f"configs/quickstart.py), or set --out_dir. transformers samples "
                                f"from an exported folder: docs/export.md")
    path, state = found
    keys = [f.name for f in dataclasses.fields(GPTConfig)]
    if lacking := [key for key in keys if key not in state["config"]]:
        raise ValueError(f"{path} was written by other code, without the key {lacking[0]}: use the "
                         f"code that wrote it")
    model = GPT(GPTConfig(**{key: state["config"][key] for key in keys}))
    load_weights(model, state, path)
    return model.eval(), get_encoding(state["tokenizer"]), state["step"]


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None,
             use_cache=True):
    """Yield max_new_tokens ids (B, 1), one at a time, that continue idx (B, T). temperature 0
    takes the likeliest. Keys and values are cached. When block_size tokens are full, the newer
    half is read once more and stays as the context. use_cache=False gives the same tokens by
    reading the whole context for each."""
    size, caches = model.config.block_size, None
    context = idx[:, -size:]
    for _ in range(max_new_tokens):
        # the context is full: go on from its newer half, whose positions are new
        if context.size(1) > size:
            context, caches = context[:, -(size // 2 or 1):], None

        # without a cache the whole context is read, with one the newest token alone
        if caches is None or not use_cache:
            caches, new = [[] for _ in model.layers], context
        with torch.compiler.set_stance("force_eager"):  # each length would compile anew
            logits = model(new, caches=caches)[0][:, -1].float()

        # the next token: the likeliest, or drawn among the likeliest k
        if top_k:
            least = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:]
            logits[logits < least] = -float("inf")
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            probabilities = (logits / temperature).softmax(-1)
            new = torch.multinomial(probabilities, 1, generator=generator)
        context = torch.cat((context, new), dim=1)
        yield new


def show(text):
    """Print what standard output can show, "?" for the rest: a terminal that is not UTF-8 must
    not end a run."""
    print(encodable(text, sys.stdout, "replace"), end="", flush=True)


def stream_text(model, encoding, prompt, max_new_tokens, temperature=0.8, top_k=50, seed=0):
    """Print the prompt and its continuation as it comes, up to <|endoftext|>. Both are token ids
    where the tokenizer is not known (data.TokenIds). Raises ValueError on a prompt of tokens that
    the model lacks."""
    device, size = next(model.parameters()).device, model.config.vocab_size
    generator = torch.Generator(device).manual_seed(seed)
    ids = encoding.encode(prompt, disallowed_special=()) or [encoding.eot_token or 0]
    if beyond := [i for i in ids if not 0 <= i < size]:
        raise ValueError(f"the prompt has token id {beyond[0]}, and the model knows 0 to {size - 1}"
                         f": it was trained on another tokenizer than {encoding.name}; give "
                         f"another prompt")
    if encoding.eot_token is None:
        show("(token ids: the tokenizer of the training data is not known)\n")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # characters of many tokens
    show(prompt)
    ids = torch.tensor([ids], device=device)
    for token in generate(model, ids, max_new_tokens, temperature, top_k, generator):
        if token.item() == encoding.eot_token:
            break
        try:
            show(decoder.decode(encoding.decode_single_token_bytes(token.item())))
        except KeyError:  # the model's vocabulary may be padded
            show("\ufffd")
    show(decoder.decode(b"", final=True) + "\n")


def print_sample(model, encoding, prompt, max_new_tokens):
    """A sample at the end of a run, which is done whether this succeeds or not."""
    try:
        show(f"\na sample, with the prompt {prompt!r}:\n{'-' * 80}\n")
        stream_text(model.eval(), encoding, prompt, max_new_tokens)
    except (KeyboardInterrupt, ValueError, OSError) as error:
        say(f"no sample: {str(error) or 'interrupted'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="out/quickstart", help="default: out/quickstart")
    parser.add_argument("--prompt", default="\n", help="text to continue")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="of the likeliest k; 0: of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if min(args.temperature, args.top_k, args.max_new_tokens, args.num_samples) < 0:
            raise ValueError("--temperature, --top_k, --max_new_tokens and --num_samples cannot "
                             "be negative")
        model, encoding, step = load_model(args.out_dir)
        model.to(args.device)
        for seed in range(args.seed, args.seed + args.num_samples):
            print(f"--- sample {seed - args.seed + 1} after {step} steps, seed {seed} ---")
            stream_text(model, encoding, args.prompt, args.max_new_tokens, args.temperature,
                        args.top_k, seed)
    except BrokenPipeError:  # `| head` ends it, as it ends other filters
        say("")  # drops what else would be flushed
        sys.exit(141)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # torch's: no such device
        sys.exit(f"error: {str(error).partition(chr(10))[0]}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
