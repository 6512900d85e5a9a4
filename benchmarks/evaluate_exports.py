"""lm-evaluation-harness over the exports of a checkpoint: its log-likelihoods beside the training model's.

  pip install lm_eval==0.4.13 accelerate          # in an environment of its own that also sees the project's packages
  python benchmarks/evaluate_exports.py CHECKPOINT [--shards build/sample_data/heldout] [--samples 64]

The training model computes the logits of documents from shards. The checkpoint is exported; the harness's `hf` model is
asked for the same documents' log-likelihoods on the text and the full export, its `hf-multimodal` on the image export,
and there to go on behind pictures. FP32 on the CPU, nothing is downloaded.
The bar: the largest difference of a log-likelihood, in nats a token, is below 1e-4; every next token is the training
model's; and a picture's negative in its place is seen (a difference of more than the bar).
"""

import argparse
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from PIL import Image, ImageOps
from torch import Tensor
from verdict import finish

from megatron_mm.errors import ConfigError
from megatron_mm.hf.export import KINDS, export
from megatron_mm.hf.gate import LIMIT, Answer, Gate
from megatron_mm.tokenizer import TextTokenizer

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "<image>"
"""What stands for a picture in the harness's prompts."""


@dataclass(frozen=True)
class Question:
    """A document as the harness is asked for it, and what the training model says."""

    context: str
    continuation: str
    images: tuple[Image.Image, ...]
    log_likelihood: float
    num_tokens: int
    """Of the continuation."""
    next_token: int
    """The training model's most probable token behind the context."""


def questions(answers: Iterable[Answer], tokenizer: TextTokenizer) -> list[Question]:
    """Return a question of each document without sound whose tokens are those of its text and that ends in text."""
    found = [_question(answer, tokenizer) for answer in answers if "input_values" not in answer.inputs]
    return [question for question in found if question is not None]


def _question(answer: Answer, tokenizer: TextTokenizer) -> Question | None:
    special = tokenizer.special_ids
    ids = [token for token in answer.inputs["input_ids"][0].tolist() if token != special["end_of_text"]]
    image = [special["image_start"], *[special["image"]] * 196, special["image_end"]]
    before, *others = tokenizer.decode(ids).split(tokenizer.decode(image))
    encoded = tokenizer.encode(before)
    for text in others:
        encoded += image + tokenizer.encode(text)
    last = others[-1] if others else before
    cut = last.find(" ", len(last) // 3)
    if cut <= 0 or encoded != ids:
        return None  # it ends in a picture, or is a piece of a document that starts amid a character
    start = len(ids) - len(tokenizer.encode(last)) + len(tokenizer.encode(last[:cut]))
    told = torch.tensor(ids[start:])
    likely = answer.logits[start - 1 : len(ids) - 1].log_softmax(-1).gather(1, told.unsqueeze(1)).double().sum()
    context = PLACEHOLDER.join([before, *others]).removesuffix(last[cut:])
    images = tuple(_picture(pixels) for pixels in answer.inputs.get("pixel_values", ()))
    return Question(context, last[cut:], images, likely.item(), len(told), int(answer.logits[start - 1].argmax()))


def _picture(pixels: Tensor) -> Image.Image:
    """Return the picture of which `pixels` (3, 224, 224) are, to the bit."""
    levels = ((pixels + 1.0) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def requests(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    """Return the harness's requests of one kind."""
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def text_likelihoods(model: HFLM, asked: Sequence[Question]) -> list[float]:
    """Return the log-likelihoods that the harness finds for texts."""
    given = requests("loglikelihood", [(question.context, question.continuation) for question in asked])
    return [likely for likely, _ in model.loglikelihood(given, disable_tqdm=True)]


def picture_likelihoods(model: HFMultimodalLM, asked: Sequence[Question], images: Sequence[tuple]) -> list[float]:
    """Return the log-likelihoods of texts behind pictures, from the inputs that the harness builds.

    It builds them to have text generated: lm_eval 0.4.13 refuses to be asked for log-likelihoods behind pictures.
    """
    found = []
    for question, pictures in zip(asked, images):
        inputs = model.tok_batch_multimodal_encode([question.context + question.continuation], [list(pictures)])
        with torch.no_grad():
            logits = model.model(**inputs).logits[0, -question.num_tokens - 1 : -1]
        told = inputs["input_ids"][0, -question.num_tokens :]
        found.append(logits.log_softmax(-1).gather(1, told.unsqueeze(1)).double().sum().item())
    return found


def next_texts(model: HFMultimodalLM, asked: Sequence[Question]) -> list[str]:
    """Return the token that the harness has the model say behind each context, as text."""
    one = {"until": [], "max_gen_toks": 1, "do_sample": False}
    given = [(question.context, dict(one), {"visual": list(question.images)}) for question in asked]
    return model.generate_until(requests("generate_until", given), disable_tqdm=True)


def apart(found: Sequence[float], asked: Sequence[Question]) -> list[float]:
    """Return the differences from the training model, in nats a token."""
    return [abs(value - question.log_likelihood) / question.num_tokens for value, question in zip(found, asked)]


def main() -> None:
    """Ask the training model, export, ask the harness, print the table, and end with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shards", default=str(ROOT / "build" / "sample_data" / "heldout"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "evaluate_exports")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    export(options.checkpoint, options.folder)
    tokenizer = TextTokenizer(options.folder / "text" / "tokenizer.json")
    asked = questions(Gate(options.checkpoint, shards=options.shards, num_samples=options.samples).answers, tokenizer)
    if not any(question.images for question in asked):
        raise ConfigError(f"{options.shards} shows no text behind pictures: name other --shards, or more --samples.")
    texts = [question for question in asked if not question.images]
    pictured = [question for question in asked if question.images]
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 4}
    largest, right = 0.0, True
    for kind in KINDS:
        model_class = HFMultimodalLM if kind == "image" else HFLM
        model = model_class(str(options.folder / kind), trust_remote_code=kind == "full", **settings)
        name = "hf-multimodal" if kind == "image" else "hf"
        worst = max(apart(text_likelihoods(model, texts), texts))
        print(f"{name:14} {kind:6} {len(texts):4} texts     log-likelihoods {worst:.1e} nats a token apart", flush=True)
        largest = max(largest, worst)
        if kind != "image":
            continue
        images = [question.images for question in pictured]
        worst = max(apart(picture_likelihoods(model, pictured, images), pictured))
        print(f"{name:14} {kind:6} {len(pictured):4} pictures  log-likelihoods {worst:.1e} nats a token apart")
        others = [tuple(map(ImageOps.invert, pictures)) for pictures in images]
        seen = min(apart(picture_likelihoods(model, pictured, others), pictured))
        print(f"{'':14} {'':6} {len(pictured):4} negatives log-likelihoods at least {seen:.1e} nats a token apart")
        expected = [tokenizer.decode([question.next_token]) for question in pictured]
        same = sum(said == token for said, token in zip(next_texts(model, pictured), expected))
        print(f"{name:14} {kind:6} {len(pictured):4} pictures  {same} next tokens are the training model's", flush=True)
        largest, right = max(largest, worst), same == len(pictured) and seen > LIMIT
    shutil.rmtree(options.folder)
    finish("evaluate_exports", ours=largest, peer=LIMIT, bar=1.0, holds=right)


if __name__ == "__main__":
    main()
