"""SentencePiece's .model files as tokenizer.json: pieces, merges, normalisation and bytes as the file has them."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_mm.errors import ConfigError, DataError

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""SentencePiece's numbers of types of pieces."""
UNIGRAM, BPE = 1, 2
"""SentencePiece's numbers of models."""
SPACE = "▁"
"""What SentencePiece writes for a space."""


def convert(path: Path, *, probes: Sequence[str]) -> bytes:
    """Return the tokenizer.json of a SentencePiece model, and say which of `probes` get other ids from it.

    Raises DataError if the file is no such model, ConfigError for a model of words or characters, and for one that
    writes spaces behind words.
    """
    # They take seconds to load, which other tokenizers are spared.
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    data, proto = path.read_bytes(), ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise DataError(f"{path} is not a SentencePiece model ({error}). Copy it again.") from error
    if not proto.pieces:
        raise DataError(f"{path} is not a SentencePiece model: it has no pieces. Copy it again.")
    trainer = proto.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise ConfigError(f"{path} is a SentencePiece model of words or characters. Use one of BPE or Unigram.")
    if trainer.treat_whitespace_as_suffix:
        raise ConfigError(f"{path} writes spaces behind words, which is not supported. Use a model that does not.")
    tokenizer = _convert(proto)
    reference = SentencePieceProcessor(model_proto=data)
    tokenizer.encode_special_tokens = True
    if other := [text for text in probes if tokenizer.encode(text).ids != reference.encode(text)]:
        log.warning(
            "%s: %d of %d hard texts get other ids here than from SentencePiece, %r among them. What is trained here "
            "is consistent; a model that was trained elsewhere may find it odd.",
            path,
            len(other),
            len(probes),
            other[0][:80],
        )
    return tokenizer.to_str().encode()


def _convert(proto: Any) -> Tokenizer:
    tokenizer = Tokenizer(_bpe(proto) if proto.trainer_spec.model_type == BPE else _unigram(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    if proto.trainer_spec.model_type == UNIGRAM:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_beginnings(proto)), "merged_with_previous")
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if has_prefix else [])])
    for piece in proto.pieces:
        if piece.type in (CONTROL, USER_DEFINED):
            # SentencePiece finds the latter in text that is normalised; `tokenizers` would put a prefix before them.
            normalized = piece.type == USER_DEFINED and not has_prefix
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=normalized, special=piece.type == CONTROL)])
    return tokenizer


def _bpe(proto: Any) -> models.BPE:
    from transformers.tokenization_utils_base import generate_merges

    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    apart = {piece.piece for piece in proto.pieces if piece.type != NORMAL}
    return models.BPE(
        vocab=vocab,
        merges=generate_merges(vocab, scores, skip_tokens=apart),
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=_has_bytes(proto),
    )


def _unigram(proto: Any) -> models.Unigram:
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=_has_bytes(proto))


def _beginnings(proto: Any) -> str:
    """Return a pattern of the first characters of pieces that no text may become: control tokens, and bytes.

    Text is cut behind them. `tokenizers` would find such a piece in a text that spells it; SentencePiece does not.
    """
    spelled = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL) and len(piece.piece) > 1]
    return "|".join([*(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in spelled), "<(?=0x[0-9A-F]{2}>)"])


def _has_bytes(proto: Any) -> bool:
    return any(piece.type == BYTE for piece in proto.pieces)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip(left=True, right=True)]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
