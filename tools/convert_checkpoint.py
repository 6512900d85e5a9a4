"""Convert between training checkpoints and Hugging Face folders: one plain process, no GPU, less than 1 GiB of memory.

to-hf     a checkpoint of any layout to OUT/text (LlamaForCausalLM), OUT/image (InternVLForConditionalGeneration) and
          OUT/full (text, images, audio and PDFs, with the code that composes them)
from-hf   a Llama-family folder, or an export, to a checkpoint that training starts from, in any layout
verify    compare every file of an export with its manifest
"""

import argparse
import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_mm import endings
from megatron_mm.checkpoint.index import PRECISIONS
from megatron_mm.errors import ConfigError
from megatron_mm.hf.export import KINDS, Options, export, verify
from megatron_mm.hf.load import import_folder
from megatron_mm.printable import line

M_MMAP_THRESHOLD = -3
"""The name of the parameter in glibc's malloc.h."""


def main() -> int:
    arguments = _parser().parse_args()
    _give_memory_back()
    return endings.run(lambda: arguments.run(arguments))


def _give_memory_back() -> None:
    """Have glibc return freed blocks to the system: it keeps those of up to 32 MiB, the size that weights pass in."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _parser() -> argparse.ArgumentParser:
    parser = endings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser("to-hf", help="write Hugging Face folders from a checkpoint")
    to_hf.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder RUN_DIR/checkpoints/step_N")
    to_hf.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    to_hf.add_argument(
        "--tokenizer", type=Path, metavar="T", help="the tokenizer.json of the run's shards (default: the checkpoint's)"
    )
    for kind in KINDS:
        to_hf.add_argument(f"--{kind}", action="store_true", help=f"write OUT/{kind} (default: every one)")
    to_hf.add_argument("--dtype", choices=PRECISIONS, help="of the weights (default: as they were trained)")
    to_hf.add_argument(
        "--kv-replicate", type=endings.at_least(1), default=1, metavar="R", help="write each key/value head R times"
    )
    to_hf.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of a shard (default 5)")
    to_hf.add_argument(
        "--gate",
        nargs="?",
        const="",
        metavar="P",
        help="compare each export's logits with the training model's, in FP32 on the run's shards or those of prefix "
        "P, and fail if they differ; both models must fit this process's memory",
    )
    to_hf.add_argument("--no-verify", action="store_true", help="do not hash the checkpoint's files first")
    to_hf.set_defaults(run=_to_hf)
    from_hf = commands.add_parser("from-hf", help="write a checkpoint to start from")
    from_hf.add_argument("folder", type=Path, metavar="FOLDER", help="a Llama-family folder, or an export of ours")
    from_hf.add_argument("out", type=Path, metavar="OUT", help="a folder that does not exist yet")
    from_hf.add_argument(
        "--preset", required=True, metavar="P", help="preset or YAML file of the run that will start from it"
    )
    from_hf.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from both")
    from_hf.add_argument(
        "--no-verify", action="store_true", help="do not compare the files of an export with its manifest first"
    )
    from_hf.set_defaults(run=_from_hf)
    check = commands.add_parser("verify", help="compare every file of an export with its manifest")
    check.add_argument("export", type=Path, metavar="EXPORT", help="OUT/text, OUT/image or OUT/full")
    check.set_defaults(run=lambda arguments: print(f"{verify(arguments.export)} files are as they were written"))
    return parser


def _to_hf(arguments: argparse.Namespace) -> None:
    kinds = tuple(kind for kind in KINDS if getattr(arguments, kind)) or None
    dtype = PRECISIONS[arguments.dtype] if arguments.dtype else None
    options = Options(kinds, dtype, arguments.kv_replicate, int(arguments.shard_gb * 1e9))
    tokenizer, gate = arguments.tokenizer, _gate(arguments)
    if arguments.shard_gb <= 0:
        raise ConfigError(f"--shard-gb {arguments.shard_gb} holds nothing: give a number above 0.")
    kept = f"what is whole is kept in {arguments.out}.partial, and the same command goes on behind it"
    with endings.note(stop=lambda: kept, disk=f"OUT={arguments.out}"):
        check = not arguments.no_verify
        export(arguments.checkpoint, arguments.out, tokenizer_path=tokenizer, options=options, gate=gate, check=check)
    for kind in KINDS:
        if (arguments.out / kind).exists():
            print(line(arguments.out / kind))


def _gate(arguments: argparse.Namespace) -> Callable[[Path], dict[str, str]] | None:
    """Return what compares an export with the training model, if that was asked for; it is built at its first use."""
    if arguments.gate is None:
        return None
    if arguments.dtype not in (None, "fp32"):
        raise ConfigError("--gate compares the weights as they were trained: leave --dtype out.")

    @functools.cache
    def build():
        from megatron_mm.hf.gate import Gate  # imports megatron-core and transformers, which a conversion does without

        return Gate(arguments.checkpoint, shards=arguments.gate)

    return lambda folder: build().compare(folder)


def _from_hf(arguments: argparse.Namespace) -> None:
    settings, check = arguments.overrides, not arguments.no_verify
    import_folder(arguments.folder, arguments.out, preset=arguments.preset, overrides=settings, check=check)
    out = line(arguments.out)
    print(f"{out}: start from it with python -m megatron_mm.train {out}/config.yaml run_dir=...")


if __name__ == "__main__":
    sys.exit(main())
