"""
Check a finished dataset, all of it.

  python -m lib.verify data/x

Sizes, checksums and token ids, and that no validation document is in the training split, too.
"""
import argparse
import hashlib
import sys

import numpy as np

from lib.data import GPT2_VOCABULARY, Dataset, get_encoding


def document_digests(split, end):
    """The digest of every document of a Split, in order; token `end` stands between documents, which may span shards."""
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
    """Check a finished dataset in full: sizes, checksums, token range, and that no validation document is in the training
    split (the same tokens from end to end; near-duplicates are not looked for). The tokenizer, which may have to be downloaded, comes
    last. Raises ValueError or FileNotFoundError."""
    opened = Dataset(folder, block_size=1, verify=False)
    known = opened.tokenizer
    vocab_size = opened.meta["vocab_size"] if opened.meta else None if known == "ids" else GPT2_VOCABULARY
    dataset = Dataset(folder, block_size=1, vocab_size=vocab_size, verify=True)
    said = (f"{folder}: good: {dataset.train.tokens:,} training tokens in {len(dataset.train.shards)} shards, "
            f"{dataset.val.tokens:,} validation tokens in {len(dataset.val.shards)}, ")
    if known == "ids":
        print(f"{said}tokenizer unknown: where documents end, and whether some are in both splits, cannot be told")
        return
    try:
        encoding = get_encoding(known)
    except ValueError as error:
        raise ValueError(f"{folder}: sizes, checksums and token ids are good, but documents in both splits were not looked for: "
                         f"{error}") from None
    Dataset(folder, block_size=1, vocab_size=encoding.n_vocab, verify=False)  # meta.json's vocabulary may not be the tokenizer's
    held_out = set(document_digests(dataset.val, encoding.eot_token))
    leaked = held_out.intersection(document_digests(dataset.train, encoding.eot_token))
    if leaked:
        raise ValueError(f"{folder}: {len(leaked):,} of {len(held_out):,} validation documents are in the training split, too: "
                         f"validation losses would flatter; make the dataset again")
    print(f"{said}tokenizer {known}, {len(held_out):,} different validation documents, none of them in the training split")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="a dataset of prepare_data.py's, or of another program's (docs/data.md)")
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be anything
    try:
        verify(parser.parse_args(argv).folder)
    except (ValueError, OSError) as error:
        sys.exit("error: " + str(error).replace("\n", "\\n"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
