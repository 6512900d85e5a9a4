"""Continue a prompt of text, images, audio and PDFs with a trained model, on a GPU or the CPU.

  python tools/generate.py runs/demo/export/full --file photo.jpg --text "A photograph of"
  python tools/generate.py runs/demo/checkpoints/step_00000140 --text "It was" --temperature 0.8

--text and --file may be repeated; they follow one another in the prompt as they stand. With --jsonl, every line of a
file is a prompt, as tools/preprocess_data.py reads them.
"""

import argparse
import sys
from pathlib import Path

from megatron_mm import endings
from megatron_mm.checkpoint.index import PRECISIONS
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.generate import Sampling, generate, opened
from megatron_mm.ingest.document import Document, Rejection, Segment, TextSegment
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.records import read_lines
from megatron_mm.noise import silence
from megatron_mm.printable import line
from megatron_mm.source import Source


def main() -> int:
    silence()
    arguments = _parser().parse_args()
    return endings.run(lambda: _run(arguments), memory="Give fewer or shorter prompts: lower --batch-size.")


def _run(arguments: argparse.Namespace) -> None:
    sampling = Sampling(
        arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed
    )
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size} cannot be: give 1 or more.")
    prompts = _prompts(arguments)
    dtype = PRECISIONS[arguments.dtype] if arguments.dtype else None
    model, check = arguments.model, not arguments.no_verify
    with opened(model, tokenizer_path=arguments.tokenizer, dtype=dtype, check=check) as speaker:
        for start in range(0, len(prompts), arguments.batch_size):
            batch = prompts[start : start + arguments.batch_size]
            alone = len(prompts) == 1
            stream = (lambda text: print(text, end="", flush=True)) if alone else None
            texts = generate(speaker, batch, sampling=sampling, on_text=stream)
            for number, text in enumerate(texts, start=start + 1):
                print("" if alone else f"[{number}] {text}")


def _prompts(arguments: argparse.Namespace) -> list[Document]:
    if arguments.jsonl is not None:
        if arguments.parts:
            raise ConfigError("--jsonl holds whole prompts: leave --text and --file out.")
        if not arguments.jsonl.is_file():
            raise ConfigError(f"--jsonl {arguments.jsonl} is no file. Give one.")
        documents, rejections = read_lines(arguments.jsonl)
        if rejections:
            raise _unreadable(rejections[0])
        if not documents:
            raise ConfigError(f"--jsonl {arguments.jsonl} holds no prompt. Give one with lines.")
        return documents
    segments: list[Segment] = []
    for kind, value in arguments.parts or []:
        if kind == "text":
            segments.append(TextSegment(value))
            continue
        if not Path(value).is_file():
            raise ConfigError(
                f"--file {value} is a folder: give a file."
                if Path(value).is_dir()
                else f"--file {value} does not exist. Give one that does."
            )
        documents, rejections = read_file(Path(value))
        if not documents:
            raise _unreadable(rejections[0])
        segments += [segment for document in documents for segment in document.segments]
    if not segments:
        raise ConfigError("give a prompt: --text, --file or --jsonl.")
    return [Document(segments, Source.TEXT)]


def _unreadable(rejection: Rejection) -> DataError:
    return DataError(f"{line(rejection.path)}: {line(rejection.reason).rstrip('.')}. Mend it, or give another file.")


class _PromptPart(argparse.Action):
    """Appends (option, value) to one list, so that the order of the prompt's parts is kept."""

    def __call__(self, parser, namespace, value, option_string=None) -> None:
        namespace.parts = [*(namespace.parts or []), (option_string.lstrip("-"), value)]


def _parser() -> argparse.ArgumentParser:
    parser = endings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="an export, or a checkpoint")
    parser.add_argument("--text", action=_PromptPart, dest="parts", metavar="TEXT", help="text of the prompt")
    parser.add_argument(
        "--file", action=_PromptPart, dest="parts", metavar="F", help="image, recording, PDF or text file"
    )
    parser.add_argument("--jsonl", type=Path, metavar="F", help="many prompts, one a line")
    parser.add_argument("--tokenizer", type=Path, metavar="T", help="tokenizer.json (default: the model's own)")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens, metavar="N")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, metavar="X", help="0: no sampling")
    parser.add_argument("--top-k", type=int, default=Sampling.top_k, metavar="K")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p, metavar="P")
    parser.add_argument("--seed", type=int, default=Sampling.seed, metavar="S")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts of --jsonl at a time")
    parser.add_argument("--dtype", choices=PRECISIONS, help="of the weights (default: as they are)")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the model's files with their manifest first"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
