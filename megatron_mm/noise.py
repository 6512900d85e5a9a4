"""Messages of our dependencies that leave a user nothing to do: named one by one, so that every other one is heard."""

import logging
import warnings

WARNINGS = (
    # megatron-core 0.19.2 without accelerators; what runs instead is decided, and printed, by this package.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "full scope is deprecated",
    "MimoModelConfig is experimental",
    "The following imports from `dynamic_context.py` will be removed",
    # Its optimizer asks views for their gradient before it sets it.
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    # Its names for collectives, which torch 2.14 renames.
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    # Its checkpoints through torch 2.14: the argument order that it uses, and metadata that each rank reads by itself.
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized",
    "Please use DTensor instead",
    # torchvision 0.29 says so of decode_image, which has no successor without FFmpeg's libraries yet.
    "The image decoding and encoding capabilities of TorchVision are deprecated",
)
LOGGED = (
    # torch: a CUDA_HOME without a driver beside it is the normal case on a laptop.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # megatron-core lays out the same buffers either way.
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
    # Said of synchronous saves too.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)


def silence() -> None:
    """Keep the messages of WARNINGS and LOGGED from the console."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=".*" + message.replace("(", r"\("))
    for logger, message in LOGGED:
        logging.getLogger(logger).addFilter(lambda record, message=message: message not in record.getMessage())
