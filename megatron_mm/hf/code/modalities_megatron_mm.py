"""The modalities of the package's own copy of this code; an export has a file of this name that imports its own."""

from megatron_mm import modalities

MODALITIES = tuple(modality.part("exported").MODALITY for modality in modalities.MODALITIES)
