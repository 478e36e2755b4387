"""
From text to token ids and back: tiktoken's encodings by name, and two that need no download.
"""
import functools

import tiktoken


class TokenIds:
    """The tokenizer of data whose tokenizer is unknown: its text is the ids, such as "17 4 250"."""

    name, eot_token = "ids", None

    def encode(self, text, **_):
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(f"the data's tokenizer is not known: give token ids as the prompt, "
                             f"such as '17 4', not {text!r}") from None

    def decode_single_token_bytes(self, token):
        return b" %d" % token


@functools.cache
def get_encoding(name):
    """The tiktoken Encoding called `name`. "bytes" has 256 bytes and <|endoftext|>, and "ids" is a
    TokenIds; neither needs a download. Raises ValueError if the vocabulary cannot be had."""
    if name == "ids":
        return TokenIds()
    if name == "bytes":
        # The pattern only cuts text into short pieces. With no merges every byte is a token.
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})",
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"unknown encoding {name!r}: choose bytes or one of {', '.join(names)}, "
                         f"or put the folder that holds your tiktoken_ext on PYTHONPATH")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets through whatever its HTTP library raises
        raise ValueError(f"tiktoken could not get the vocabulary of {name!r} "
                         f"({type(error).__name__}): connect once, or set TIKTOKEN_CACHE_DIR to a "
                         f"folder that holds it, or use --encoding bytes") from None
