"""HuBERT (Hsu et al. 2021) in Hugging Face's module code; files of torchaudio and Hugging Face.

Its encoder is Wav2Vec 2.0's: what differs is how it was pretrained, and what its library calls it.
"""

from torch import nn

from megatron_mm.modalities.audio.spec import AudioConfig
from megatron_mm.modalities.audio.towers.wav2vec2 import Wav2Vec2


class Hubert(Wav2Vec2):
    """HuBERT base in the form ls960, large and xlarge in the form lv60k."""

    names = (*Wav2Vec2.names, (r"^hubert\.", ""))
    left_behind = Wav2Vec2.left_behind + r"|hubert\.masked_spec_embed"
    model_type, architecture = "hubert", "HubertModel"

    def build(self, config: AudioConfig) -> nn.Module:
        """Return a HubertModel without dropout and masking."""
        from transformers import HubertConfig, HubertModel

        return HubertModel(HubertConfig(**self.shape(config), attn_implementation="sdpa"))


FAMILY = Hubert()
