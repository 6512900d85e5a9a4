"""Text to ids and back, and the special ids that stand for what is not text."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_mm.errors import DataError
from megatron_mm.shards import TokenizerInfo

SPECIAL_TOKENS = {
    "pad": "<|pad|>",
    "end_of_text": "<|endoftext|>",
    "image_start": "<|image_start|>",
    "image": "<|image|>",
    "image_end": "<|image_end|>",
    "audio_start": "<|audio_start|>",
    "audio": "<|audio|>",
    "audio_end": "<|audio_end|>",
}
"""Role and spelling of every special token; `image` and `audio` are the placeholders that media features replace."""


class TextTokenizer:
    """A byte-level BPE tokenizer from a local tokenizer.json, with this package's special tokens.

    Special tokens that the file lacks are appended behind its vocabulary, in the order of SPECIAL_TOKENS. Text that
    spells a special token is encoded as the text that it is, so no document can forge a placeholder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            self._tokenizer = Tokenizer.from_str(content.decode())
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: a tokenizer is a local tokenizer.json file. Make one with "
                "`python tools/train_tokenizer.py`, or copy that of a Hugging Face model."
            ) from None
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json file: {error}") from error
        self._tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_ids = {role: self._tokenizer.token_to_id(token) for role, token in SPECIAL_TOKENS.items()}
        """Id of each role of SPECIAL_TOKENS."""
        self._sha256 = hashlib.sha256(content).hexdigest()

    @cached_property
    def info(self) -> TokenizerInfo:
        """What shards record of this tokenizer."""
        vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        return TokenizerInfo(self._sha256, vocab_size, self.special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def to_json(self) -> str:
        """Return the tokenizer.json of this tokenizer, special tokens included."""
        return self._tokenizer.to_str(pretty=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of `vocab_size` ids, special tokens last.

    Raises DataError if the texts are too few for so many ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the texts give only {tokenizer.get_vocab_size()} ids, not vocab_size={vocab_size}. Give more text, or "
            "ask for fewer ids."
        )
    return tokenizer
