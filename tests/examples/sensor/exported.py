"""Sensor readings in an exported megatron_mm model: its encoder, which transformers has not, and its processor."""

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig


class SensorMLPConfig(PreTrainedConfig):
    """Sizes of the encoder."""

    model_type = "sensor_mlp"

    def __init__(self, hidden_size=16, window=2, channels=3, **kwargs):
        self.hidden_size, self.window, self.channels = hidden_size, window, channels
        super().__init__(**kwargs)


class SensorMLP(PreTrainedModel):
    """Two linear layers over each window of readings."""

    config_class = SensorMLPConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear_1 = nn.Linear(config.window * config.channels, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, readings):
        """(num_recordings, num_readings, channels) to (num_recordings, num_windows, hidden_size)."""
        size = self.config.window * self.config.channels
        return self.linear_2(nn.functional.gelu(self.linear_1(readings.reshape(len(readings), -1, size))))


AutoConfig.register("sensor_mlp", SensorMLPConfig, exist_ok=True)
AutoModel.register(SensorMLPConfig, SensorMLP, exist_ok=True)


class SensorModel:
    """The model's methods for readings."""

    def get_sensor_features(self, readings, num_readings=None, **kwargs):
        """(num_recordings, longest, 3) and their lengths to pooler_output (windows of all, hidden_size)."""
        whole = self.sensor_tower(readings.to(self.dtype))
        lengths = [readings.shape[1]] * len(readings) if num_readings is None else num_readings.tolist()
        window = self.config.sensor_window
        features = torch.cat([own[: length // window] for own, length in zip(whole, lengths)])
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.sensor_projector(features))


class SensorProcessor:
    """The processor's methods for readings."""

    def process_sensor(self, sensor, **kwargs):
        """Return the model's inputs of recordings, and what stands for each in the text."""
        window, names = self.sensor_window, self.tokenizer
        own = [torch.as_tensor(np.asarray(one, np.float32)) for one in sensor]
        own = [one[: len(one) // window * window] for one in own]
        lengths = [len(one) for one in own]
        inputs = {
            "readings": nn.utils.rnn.pad_sequence(own, batch_first=True),
            "num_readings": torch.tensor(lengths),
        }
        runs = [self.sensor_token * (length // window) for length in lengths]
        return inputs, [names.start_sensor_token + run + names.end_sensor_token for run in runs]

    def open_sensor(self, data):
        """Return a recording of a document as `sensor` takes it."""
        return np.frombuffer(data, "<f4").reshape(-1, 3)

    def count_sensor(self, sensor_lengths):
        """Return the tokens of recordings of so many readings."""
        return {"num_sensor_tokens": [length // self.sensor_window + 2 for length in sensor_lengths]}


class MODALITY:
    """What the model and its processor ask of readings."""

    name, argument, sizes = "sensor", "sensor", "sensor_lengths"
    inputs = ("readings", "num_readings")
    encoder, model_type = "sensor_config", "sensor_mlp"
    tower, projector = "sensor_tower", "sensor_projector"
    layers = ()
    settings = {"sensor_window": 2}  # noqa: RUF012
    parts = ()
    model, processor = SensorModel, SensorProcessor

    @staticmethod
    def set_up(config):
        """Leave the configuration as it is."""

    @staticmethod
    def set_up_processor(processor):
        """Leave the processor as it is."""

    @staticmethod
    def width(config):
        """Return the width of the features."""
        return config.sensor_config.hidden_size
