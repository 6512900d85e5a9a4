"""The tokenizer: text survives, and text never becomes a special token."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from small import VOCAB_SIZE, WORDS, save_tokenizer, sentence
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_mm import tokenizer as module
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest.pipeline import preprocess
from megatron_mm.spelling import NEVER_IN_UTF8, PROBES, SPELLED, byte_characters
from megatron_mm.tokenizer import HARD_TEXTS, SPECIAL_TOKENS, TextTokenizer, train_tokenizer

HARD = [
    "plain",
    " leading and trailing  spaces ",
    "tabs\tand\n\nnewlines\r\n",
    "naïve café — “quotes” … Ünïcödé",
    "中文字符 日本語 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 🇨🇭 😀",
    "x" * 1000 + " " * 500,
    "a\u0301\u0327 \ufffd \u200b\u2028",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


@pytest.mark.parametrize("text", HARD)
def test_text_survives(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.info.vocab_size


@pytest.mark.parametrize("token", SPECIAL_TOKENS.values())
def test_text_cannot_forge_a_special_token(tokenizer: TextTokenizer, token: str) -> None:
    ids = tokenizer.encode(f"before {token} after")
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == f"before {token} after"


def test_special_tokens_are_decoded_to_their_spelling(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode([tokenizer.special_ids["image"]]) == "<|image|>"


def test_ids_are_distinct_and_inside_the_vocabulary(tokenizer: TextTokenizer) -> None:
    assert tokenizer.info.vocab_size == VOCAB_SIZE
    assert len(set(tokenizer.special_ids.values())) == len(SPECIAL_TOKENS)
    assert max(tokenizer.special_ids.values()) < VOCAB_SIZE


def test_a_tokenizer_without_our_special_tokens_gets_them(tmp_path: Path) -> None:
    state = json.loads(save_tokenizer(tmp_path / "own.json").read_text())
    state["added_tokens"] = []
    (tmp_path / "plain.json").write_text(json.dumps(state))
    tokenizer = TextTokenizer(tmp_path / "plain.json")
    assert tokenizer.info.vocab_size == VOCAB_SIZE
    assert sorted(tokenizer.special_ids.values()) == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert TextTokenizer(tmp_path / "plain.json").info == tokenizer.info


def test_bad_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: a tokenizer is a local tokenizer.json"):
        TextTokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match="is not a tokenizer.json file"):
        TextTokenizer(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not a tokenizer.json file"):
        TextTokenizer(tmp_path / "binary.json")


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="only .* ids, not vocab_size=5000"):
        train_tokenizer(["too little"], vocab_size=5000)


def test_training_is_repeatable() -> None:
    texts = ["one two three four five six seven eight nine ten " * 3, "ten nine eight"]
    assert train_tokenizer(texts, vocab_size=275).to_str() == train_tokenizer(texts, vocab_size=275).to_str()


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_every_engine_gives_the_ids_of_the_reference(tokenizer: TextTokenizer, engine: str) -> None:
    own = TextTokenizer(tokenizer.path, engine=engine)
    texts = [*HARD, *HARD_TEXTS]
    expected = [tokenizer._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in own.encode_batch(texts)] == expected
    assert (own._fast is not None) == (engine == "auto")
    with pytest.raises(DataError, match="half of a surrogate pair"):
        own.encode("a \ud800 b")


def test_a_tokenizer_that_gigatoken_does_not_match_is_used_slowly_and_loudly(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TextTokenizer, "_agrees", lambda self, fast, text: "\n" not in text)
    own = TextTokenizer(tokenizer.path)
    assert own.encode("red hill") == tokenizer.encode("red hill")
    assert own._fast is None
    assert "gigatoken finds other ids" in caplog.text


def test_one_sample_is_compared_for_so_many_characters_in_any_number_of_calls(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    own = TextTokenizer(tokenizer.path)
    assert own._fast is not None
    monkeypatch.setattr(TextTokenizer, "_agrees", lambda self, fast, text: compared.append(text) or True)
    monkeypatch.setattr(module, "SAMPLE_EVERY", 1000)
    own._unchecked = 1000  # as at the start, of which the constant has another value
    for _ in range(100):
        own.encode("red hill by the lake")  # 20 characters
    assert len(compared) == 1 + 2, "the first call, and one for each thousand"
    own.encode_batch(["red hill by the lake"] * 500)
    assert len(compared) == 1 + 2 + 10


def pieces(*more: str) -> list[str]:
    """A vocabulary of the letters of WORDS, and more."""
    return [*more, *sorted(set(WORDS))]


def with_bytes(kind: str) -> Tokenizer:
    """A tokenizer over characters with byte fallback, as SentencePiece's are."""
    names = pieces("<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "e", "t", "h", "th", "▁th")
    names = list(dict.fromkeys(names))
    if kind == "BPE":
        vocab, merges = {name: number for number, name in enumerate(names)}, [("t", "h"), ("▁", "th")]
        made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    else:
        vocab = [(name, -100.0 if name.startswith("<") else -float(2 + (len(name) == 1))) for name in names]
        made = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(undone)
    return made


def byte_level(change: Callable[[Tokenizer], object] = lambda made: None, *, without: str = "") -> Tokenizer:
    """A byte-level BPE of single bytes."""
    alphabet = [character for character in byte_characters() if character not in without]
    made = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    change(made)
    return made


def trained(model: models.Model, trainer: trainers.Trainer) -> Tokenizer:
    """A tokenizer over characters or words, of words."""
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator([WORDS], trainer)
    return made


def setting(name: str, value: object) -> Callable[[Tokenizer], None]:
    return lambda made: setattr(made, name, value)


def normalised(normalizer: normalizers.Normalizer) -> Tokenizer:
    return byte_level(setting("normalizer", normalizer))


def word_piece() -> Tokenizer:
    return trained(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=["[UNK]"]))


def word_level() -> Tokenizer:
    return trained(models.WordLevel(unk_token="<none>"), trainers.WordLevelTrainer(special_tokens=["<none>"]))


def unigram() -> Tokenizer:
    return trained(models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"]))


def characters() -> Tokenizer:
    return trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(special_tokens=["<unk>"]))


def forgeable() -> Tokenizer:
    """A Unigram of which a piece spells a special token."""
    made = with_bytes("Unigram")
    state = json.loads(made.to_str())
    state["model"]["vocab"].append(["<|image|>", -1.0])
    return Tokenizer.from_str(json.dumps(state))


LOSSY = {
    "WordPiece": (word_piece, r"WordPiece, which turns words that are not in its vocabulary into \[UNK\]"),
    "WordLevel": (word_level, "WordLevel, which turns words that are not in its vocabulary into <none>"),
    "Unigram": (unigram, "Unigram over characters without byte fallback"),
    "BPE of characters": (characters, "BPE over characters without byte fallback"),
    "bytes that are missing": (lambda: byte_level(without="Ġé"), r"lacks 2 of the 256 bytes \(0x20, 0xE9"),
    "lower-casing": (lambda: normalised(normalizers.Lowercase()), 'loses letters: it reads "The Q'),
    "no accents": (
        lambda: normalised(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "loses letters: it reads 'naïve",
    ),
    "no decoder": (lambda: byte_level(setting("decoder", None)), "loses letters: it reads"),
    "forged": (forgeable, r"makes text that spells <\|image\|> the special token"),
}
"""Tokenizers that lose text, and what is said."""


@pytest.mark.parametrize("name", LOSSY)
def test_a_tokenizer_that_cannot_spell_every_text_is_refused(name: str, tmp_path: Path) -> None:
    make, words = LOSSY[name]
    make().save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=words):
        TextTokenizer(tmp_path / "t.json").require_every_text()


def test_preprocessing_refuses_it(tmp_path: Path) -> None:
    word_piece().save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("one 字\n")
    with pytest.raises(ConfigError, match="cannot spell every text"):
        preprocess(
            [str(tmp_path / "a.txt")], output_prefix=str(tmp_path / "p"), tokenizer_path=str(tmp_path / "t.json")
        )
    assert not list(tmp_path.glob("p.*"))


def test_bytes_that_no_text_has_may_be_missing(tmp_path: Path) -> None:
    never = "".join(character for character, byte in byte_characters().items() if byte in NEVER_IN_UTF8)
    assert len(never) == 13
    byte_level(without=never).save(str(tmp_path / "t.json"))
    TextTokenizer(tmp_path / "t.json").require_every_text()


def test_the_byte_level_alphabet_is_that_of_tokenizers() -> None:
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character, byte in byte_characters().items():
        if byte < 0x80:
            assert splitter.pre_tokenize_str(chr(byte))[0][0] == character


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_byte_fallback_spells_every_text(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_bytes(kind).save(str(tmp_path / "t.json"))
    own = TextTokenizer(tmp_path / "t.json")
    own.require_every_text()
    assert "'a ▁ b' is read back as 'a   b'" in caplog.text
    assert ("'<0x41> <s> </s>' is read back" in caplog.text) == (kind == "Unigram"), "`tokenizers` finds the byte"
    for text in HARD + [text for text in HARD_TEXTS if "▁" not in text]:
        assert own.decode(own.encode(text)) == text


SAID = {
    "NFC": (normalizers.NFC(), "Ünïcödé e\u0301 "),
    "NFKC": (normalizers.NFKC(), "ﬁ ½ ²' is read back as "),
    "white space": (normalizers.Strip(), "' at the start' is read back as 'at the start'"),
}
"""Normalizers that lose no letters, and what is said of them."""


@pytest.mark.parametrize("name", SAID)
def test_what_a_normalizer_changes_is_said(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    normalizer, words = SAID[name]
    normalised(normalizer).save(str(tmp_path / "t.json"))
    TextTokenizer(tmp_path / "t.json").require_every_text()
    assert "changes text, and what it changes is trained on as changed" in caplog.text
    assert words in caplog.text


def test_nothing_is_said_of_a_tokenizer_that_changes_nothing(
    tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.require_every_text()
    assert not caplog.text


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
"""What SentencePiece is told so that it changes no text."""


def save_model(path: Path, **settings) -> Path:
    """Train a SentencePiece model."""
    rng, model = np.random.default_rng(0), io.BytesIO()
    lines = [*(sentence(rng, 8).strip() for _ in range(200)), "def f(x): return {**x, 'k': [1, 2]}", "<s> </s> <0x41>"]
    settings = {"byte_fallback": True, "vocab_size": 380, "minloglevel": 2, "hard_vocab_limit": False, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("more", [{}, {"add_dummy_prefix": False, "user_defined_symbols": ["<mask>", "the"]}])
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(kind: str, more: dict, tmp_path: Path) -> None:
    path = save_model(tmp_path / "t.model", model_type=kind, **PLAIN, **more)
    own, reference = TextTokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    own.require_every_text()
    for text in (*HARD, *HARD_TEXTS, *PROBES, *SPELLED, "a <mask> the them <s> </s> <unk> <0x41>"):
        ids = own.encode(text)
        assert ids == reference.encode(text), text
        assert "▁" in text or own.decode(ids) == text
    (tmp_path / "t.json").write_bytes(own.content)
    assert TextTokenizer(tmp_path / "t.json").info == own.info, "what shards store is the same tokenizer"


def test_what_a_sentencepiece_model_changes_is_said_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = TextTokenizer(save_model(tmp_path / "nfkc.model", model_type="unigram"))
    own.require_every_text()
    assert "'two  spaces\\tand a tab' is read back as 'two spaces and a tab'" in caplog.text
    own = TextTokenizer(save_model(tmp_path / "lower.model", model_type="bpe", normalization_rule_name="nmt_nfkc_cf"))
    with pytest.raises(ConfigError, match='loses letters: it reads "The Quick'):
        own.require_every_text()
    own = TextTokenizer(save_model(tmp_path / "unk.model", model_type="bpe", byte_fallback=False, **PLAIN))
    with pytest.raises(ConfigError, match="without byte fallback"):
        own.require_every_text()
    with pytest.raises(ConfigError, match="a SentencePiece model of words or characters"):
        TextTokenizer(save_model(tmp_path / "words.model", model_type="word", byte_fallback=False, vocab_size=40))
    for name, data in (("none", b"\xff\xff no model"), ("empty", b"")):
        (tmp_path / f"{name}.model").write_bytes(data)
        with pytest.raises(DataError, match="is not a SentencePiece model"):
            TextTokenizer(tmp_path / f"{name}.model")
