"""Who decodes the media of a run, chosen once at its start."""

import logging

import torch

from megatron_mm.config import Config
from megatron_mm.errors import ConfigError
from megatron_mm.modalities import MODALITIES, Geometries
from megatron_mm.modalities.decoder import Decoder

log = logging.getLogger(__name__)


def make_decoders(config: Config, *, has_gpu: bool) -> dict[str, Decoder]:
    """Return the decoder of each modality, by its name, as data.decoder has it.

    auto takes DALI where there is a GPU, and the faster reference on a CPU. Raises ConfigError if DALI is asked for and
    not installed.
    """
    kind = config.data.decoder
    if kind == "reference" or (kind == "auto" and not has_gpu):
        return reference_decoders(config.encoders)
    device_id = torch.cuda.current_device() if has_gpu else None
    decoders = {}
    try:
        for modality in MODALITIES:
            decode, section = modality.part("decode"), getattr(config, modality.name)
            decoders[modality.name] = decode.Decoder(section, dali=decode.dali_decoder(section, device_id=device_id))
    except ImportError as error:
        if kind == "auto":
            log.warning("DALI is not installed (%s): media are decoded on the CPU", error)
            return reference_decoders(config.encoders)
        raise ConfigError(
            f"data.decoder=dali needs DALI, which cannot be imported ({error}). Install nvidia-dali-cuda130, or use "
            "data.decoder=reference."
        ) from error
    return decoders


def reference_decoders(geometries: Geometries) -> dict[str, Decoder]:
    """Return the reference decoder of each modality, by its name."""
    return {modality.name: modality.part("decode").Decoder(geometries[modality.name]) for modality in MODALITIES}
