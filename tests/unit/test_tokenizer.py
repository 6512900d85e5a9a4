"""The tokenizer: text survives, and text never becomes a special token."""

import json
from pathlib import Path

import pytest
from small import VOCAB_SIZE, save_tokenizer

from megatron_mm.errors import DataError
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
