"""
Check all of a finished dataset.

  python -m lib.verify data/x

It checks sizes, checksums and token ids, and that no validation document is also in the training
split (the same tokens from end to end; it does not look for near-duplicates).
"""
import argparse
import hashlib
import sys

import numpy as np

from lib.data import GPT2_VOCABULARY, Dataset
from lib.tokenizer import get_encoding


def document_digests(split, end):
    """The digest of each document of a Split, in order. Token `end` separates documents, which may
    span shards."""
    rest = []
    for block in (block for shard in split.shards for block in shard.blocks()):
        start = 0
        for stop in np.flatnonzero(block == end):
            document = b"".join((*rest, block[start:stop].astype("<u4").tobytes()))
            rest, start = [], stop + 1
            if document:
                yield hashlib.blake2b(document, digest_size=16).digest()
        rest.append(block[start:].astype("<u4").tobytes())
    if any(rest):
        yield hashlib.blake2b(b"".join(rest), digest_size=16).digest()


def verify(folder):
    """Check a finished dataset in full and print a line. The tokenizer's vocabulary, which may need
    a download, comes last. Raises ValueError or FileNotFoundError."""
    opened = Dataset(folder, block_size=1, verify=False)
    tokenizer = opened.tokenizer
    vocab_size = None if tokenizer == "ids" else GPT2_VOCABULARY
    if opened.meta:
        vocab_size = opened.meta["vocab_size"]
    dataset = Dataset(folder, block_size=1, vocab_size=vocab_size, verify=True)
    train, val = dataset.train, dataset.val
    good = (f"{folder}: good: {train.tokens:,} training tokens in {len(train.shards)} shards, "
            f"{val.tokens:,} validation tokens in {len(val.shards)}")
    if tokenizer == "ids":
        print(f"{good}; the tokenizer is unknown, so documents in both splits cannot be found")
        return

    try:
        encoding = get_encoding(tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: sizes, checksums and token ids are good, but documents in "
                         f"both splits were not looked for: {error}") from None
    # the vocabulary that meta.json names may be larger than the tokenizer's
    Dataset(folder, block_size=1, vocab_size=encoding.n_vocab, verify=False)
    held_out = set(document_digests(val, encoding.eot_token))
    leaked = held_out.intersection(document_digests(train, encoding.eot_token))
    if leaked:
        raise ValueError(f"{folder}: {len(leaked):,} of {len(held_out):,} validation documents are "
                         f"also in the training split, so validation losses would be too low: make "
                         f"the dataset again")
    print(f"{good}, tokenizer {tokenizer}, {len(held_out):,} different validation documents, none "
          f"of them in the training split")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER",
                        help="a dataset, made by prepare_data.py or another program (docs/data.md)")
    args = parser.parse_args(argv)
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be anything
    try:
        verify(args.folder)
    except (ValueError, OSError) as error:
        sys.exit("error: " + str(error).replace("\n", "\\n"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
