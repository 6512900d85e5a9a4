"""Text to ids and back, and the special ids that stand for what is not text.

`tokenizers` says what the ids are; gigatoken finds the same ones some fifty times faster. It is used for every
tokenizer.json whose ids on HARD_TEXTS agree, and a sample of what it encodes is compared again all along.
"""

import hashlib
import logging
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from gigatoken.gigatoken_rs import BPETokenizer, SentencePieceTokenizer, load_hf_json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.modalities import MODALITIES
from megatron_mm.retry import retrying
from megatron_mm.sentencepiece_model import convert
from megatron_mm.shards import TokenizerInfo
from megatron_mm.spelling import PROBES, SPELLED, changed, lost_letters, why_not_every_text

SPECIAL_TOKENS = {
    "pad": "<|pad|>",
    "end_of_text": "<|endoftext|>",
    **{role: f"<|{role}|>" for modality in MODALITIES for role in modality.special_tokens},
}
"""Role and spelling of every special token; that of a modality's name is the placeholder that its features replace."""

FastTokenizer = BPETokenizer | SentencePieceTokenizer
Engine = Literal["auto", "reference"]
"""What finds the ids: auto is gigatoken where it agrees with `tokenizers`, reference is `tokenizers` alone."""
HARD_TEXTS = (
    *("", " ", "plain text", " leading and trailing  ", "it's they'll I'VE 'S don''t", "x" * 3000, "a\tb\n\nc\r\n d"),
    *(
        "1 23 456 7890 3.14159 1e-5 ½ Ⅷ ٣٤٥ 一二三",
        "naïve café — “quotes” … Ünïcödé ﬁ ŉ",
        "e\u0301 a\u0308\u0323 \u0344",
    ),
    *(
        "中文字符。日本語のテキスト、한국어 텍스트",
        "العَرَبِيَّة עִבְרִית हिन्दी ภาษาไทย မြန်မာ",
        "Ελληνικά Кириллица ՀԱՅ ქართ 𝒜𝓑 𐍈𐌰",
    ),
    *(
        "👩‍👩‍👧‍👦 🇨🇭 😀👍🏽 ❤️ ☃",
        "mixed中文and한글та кириллицаالعربية123",
        "\u200b\u200d\u2028\u2029\u00a0\u3000\ufeff\u0085x",
    ),
    *(
        " " * 1 + "a" + " " * 2 + "b" + " " * 17 + "c" + " " * 1000 + "d" + " " * 70,
        "\n" * 50 + "x" + "\t" * 33 + " \n \n",
    ),
    *(
        "def f(x):\n    return {**x, 'k': [1, 2]}  # ok\n",
        "https://a.b/c?d=e&f=%20#g <p class='q'>&amp;</p>",
        "\0\x01\x7f\x80",
    ),
    b"bad \xff\xfe utf-8 \xc3( \xed\xa0\x80 \xf0\x28\x8c\xbc end".decode("utf-8", "replace"),
    *SPECIAL_TOKENS.values(),
    "".join(f"before {token}after" for token in SPECIAL_TOKENS.values()),
)
"""What tokenizers are known to disagree on."""
SAMPLE_CHARACTERS = 1_000
"""Length of a text that is encoded by the reference as well."""
SAMPLE_EVERY = 4 * 2**20
"""Characters of which one such text is taken, in however many calls they come; the first call is always compared."""

log = logging.getLogger(__name__)


class EncodingMismatch(DataError):
    """gigatoken and `tokenizers` give different ids: nothing that was encoded can be trusted."""


class TextTokenizer:
    """A tokenizer from a local tokenizer.json or SentencePiece .model, with this package's special tokens.

    Special tokens that the file lacks are appended behind its vocabulary, in the order of SPECIAL_TOKENS. Text that
    spells a special token is encoded as the text that it is, so no document can forge a placeholder.
    """

    def __init__(self, path: str | Path, *, engine: Engine = "auto") -> None:
        self.path = Path(path)
        self.engine = engine
        try:
            content = retrying(self._read, what=self.path)
            self._tokenizer = Tokenizer.from_str(content.decode())
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: a tokenizer is a local tokenizer.json file. Make one with "
                "`python tools/train_tokenizer.py`, or copy that of a Hugging Face model."
            ) from None
        except (ConfigError, DataError):
            raise
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}. A tokenizer is a local tokenizer.json file."
            ) from error
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{path} is not a tokenizer.json file ({error}). Copy it again, or make one with "
                "tools/train_tokenizer.py."
            ) from error
        self._tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_ids = {role: self._tokenizer.token_to_id(token) for role, token in SPECIAL_TOKENS.items()}
        """Id of each role of SPECIAL_TOKENS."""
        self.content = content
        """The file as it is, without the special tokens that it lacks; of a .model, the tokenizer.json that it is."""
        self._unchecked = SAMPLE_EVERY  # characters that were encoded and not yet stood for by a sample

    def _read(self) -> bytes:
        is_model = self.path.suffix == ".model"
        return convert(self.path, probes=(*HARD_TEXTS, *PROBES, *SPELLED)) if is_model else self.path.read_bytes()

    def require_every_text(self) -> None:
        """Pass if every text can be encoded and read back; say what is changed of some on the way.

        Raises ConfigError with the reason if letters are lost, or if text can become a special token.
        """
        advice = "Use a byte-level BPE, or BPE or Unigram with byte fallback."
        if reason := why_not_every_text(orjson.loads(self.content)):
            raise ConfigError(f"{self.path} cannot spell every text: {reason}. {advice}")
        if lost := lost_letters(PROBES, self._read_back):
            raise ConfigError(f"{self.path} loses letters: it reads {lost[0]!r} back as {lost[1]!r}. {advice}")
        for role, spelling in SPECIAL_TOKENS.items():
            if self.special_ids[role] in self._encode_by_reference(f"a{spelling}b"):
                raise ConfigError(
                    f"{self.path} makes text that spells {spelling} the special token: documents could forge it. Take "
                    "it out of the vocabulary of its model."
                )
        if differing := changed((*PROBES, *SPELLED), self._read_back):
            log.warning(
                "%s changes text, and what it changes is trained on as changed:%s",
                self.path,
                "".join(f"\n  {text!r} is read back as {back!r}" for text, back in differing),
            )

    def _read_back(self, text: str) -> str:
        return self.decode(self._encode_by_reference(text).tolist())

    @cached_property
    def info(self) -> TokenizerInfo:
        """What shards record of this tokenizer."""
        vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        return TokenizerInfo(hashlib.sha256(self.content).hexdigest(), vocab_size, self.special_ids)

    def special_id(self, spelling: str) -> int:
        """Return the id of a special token of the file, by its spelling. Raises DataError if it has none."""
        found = self._tokenizer.token_to_id(spelling)
        if found is None:
            raise DataError(f"{self.path} has no token {spelling!r}, which a chat template writes.")
        return found

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without any special token. Raises DataError if it is not Unicode text."""
        (ids,) = self.encode_batch([text])
        return ids.tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, (num_tokens,) uint32, without any special token.

        Raises DataError if a text is not Unicode text, EncodingMismatch if gigatoken gives other ids than `tokenizers`.
        """
        if self._fast is None:
            return [self._encode_by_reference(text) for text in texts]
        try:
            ids = [self._fast.encode(text) for text in texts]
        except (UnicodeEncodeError, TypeError):
            return [self._encode_by_reference(text) for text in texts]
        self._unchecked += sum(map(len, texts))
        for number in range(self._unchecked // SAMPLE_EVERY if texts else 0):
            self._check_sample(texts, number)
            self._unchecked -= SAMPLE_EVERY
        return ids

    def _encode_by_reference(self, text: str) -> np.ndarray:
        try:
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError("the text holds half of a surrogate pair, which no Unicode text does") from error

    @cached_property
    def _fast(self) -> FastTokenizer | None:
        if self.engine == "reference":
            return None
        try:
            fast = load_hf_json(self._as_text_only())
            wrong = next((text for text in HARD_TEXTS if not self._agrees(fast, text)), None)
        except Exception as error:  # gigatoken raises bare exceptions for what it does not support
            log.warning("%s: gigatoken does not support it (%s): `tokenizers` is used, far slower.", self.path, error)
            return None
        if wrong is not None:
            log.warning(
                "%s: gigatoken finds other ids than `tokenizers` for %r: the latter is used.",
                self.path,
                wrong[:80],
            )
            return None
        return fast

    def _as_text_only(self) -> bytes:
        """Return the tokenizer.json without special tokens: gigatoken would find them in text."""
        state = orjson.loads(self.content)
        state["added_tokens"] = [token for token in state.get("added_tokens") or [] if not token.get("special")]
        return orjson.dumps({**state, "post_processor": None, "truncation": None, "padding": None})

    def _agrees(self, fast: FastTokenizer, text: str) -> bool:
        return np.array_equal(fast.encode(text), self._encode_by_reference(text))

    def _check_sample(self, texts: Sequence[str], number: int) -> None:
        """Compare a piece of one text with the reference; which one depends on the texts, and on `number`, alone."""
        key = zlib.crc32(b"%d %d %d" % (number, len(texts), len(texts[0])))
        text = texts[key % len(texts)]
        start = key % max(1, len(text) - SAMPLE_CHARACTERS)
        sample = text[start : start + SAMPLE_CHARACTERS]
        if not self._agrees(self._fast, sample):
            raise EncodingMismatch(
                f"{self.path}: gigatoken and `tokenizers` give different ids for {sample[:80]!r}. Use "
                "--tokenizer-engine reference, which is slower."
            )

    def to_json(self) -> str:
        """Return the tokenizer.json of this tokenizer, special tokens included."""
        return self._tokenizer.to_str(pretty=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of `vocab_size` ids, special tokens last.

    Raises DataError if the texts are too few for so many ids, ConfigError if there are more bytes than ids.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ConfigError(f"--vocab-size {vocab_size} is less than every byte and special token needs: {least}.")
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
