"""The optimizers, a file each: its settings, the state that it keeps, and how a step changes parameters.

Another optimizer is another file in this folder: `optimizer.name` is the name of the file, which calls its section
OPTIMIZER. Settings are read where nothing is trained, so a file imports torch inside the functions that need it.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import ModelWrapValidatorHandler, NonNegativeFloat, PositiveFloat, model_validator

from megatron_mm.errors import ConfigError
from megatron_mm.settings import Section

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

DEFAULT = "adamw"
"""The optimizer of a configuration that names none, as all did before there were others."""
MAIN_BYTES = 4
"""Bytes of a trained parameter's FP32 main copy; its state comes on top."""


@dataclass(frozen=True)
class Share:
    """What one step updates of one parameter group on one rank: flat ranges of its parameters that have a gradient.

    The distributed optimizer deals parameters out by elements: each tensor here is (numel_on_rank,) FP32, of which
    nobody may ask what shape the whole parameter has.
    """

    parameters: list["Tensor"]
    gradients: list["Tensor"]
    state: Mapping[str, list["Tensor"]]
    """The tensors of each name in `Rule.state`, in the order of the parameters."""
    lr: float
    """Learning rate of this step, of this group."""
    weight_decay: float
    """Weight decay of this group: 0 for vectors."""
    step: int
    """Optimizer steps including this one: 1 at first."""
    divisor: float
    """What each gradient is still to be divided by, where `Rule.divides`; 1 elsewhere."""


@dataclass(frozen=True)
class Rule:
    """How a step changes the parameters that follow this rule; a run chains one optimizer a rule."""

    state: tuple[str, ...]
    """Names of the FP32 tensors kept for each parameter, zero at first: checkpoints hold them by these names."""
    update: Callable[[Share], None]
    """Changes a share's parameters and state, in place, each element by itself."""
    name: str = "rest"
    """Tells the rules of one optimizer apart."""
    takes: Callable[[str, "Tensor"], bool] = lambda name, parameter: True
    """Whether a parameter, by its name and itself, follows this rule; it follows the first that takes it."""
    divides: bool = False
    """Whether `update` divides gradients by `Share.divisor` as it reads them: clipping without a pass of its own."""
    fused: Callable[[list[dict[str, Any]]], "Optimizer | None"] = lambda groups: None
    """Returns an installed library's optimizer over parameter groups, of the same state; None if there is none."""


class OptimizerConfig(Section):
    """What all optimizers share. Norms, biases and other vectors are never decayed."""

    name: str = DEFAULT
    """Optimizer: a file of megatron_mm/optimizers."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 2e-5
    """Learning rate at the end of the decay."""
    encoder_lr_scale: PositiveFloat = 0.1
    """Learning rate of trainable encoders, as a fraction of the decoder's at every step."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices."""
    decay_embeddings: bool = False
    """Decay the token embedding too; the head is always decayed."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""

    @model_validator(mode="wrap")
    @classmethod
    def _as_named(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Return settings as the section of the optimizer that they name."""
        if cls is OptimizerConfig and isinstance(value, Mapping):
            return find(value.get("name", DEFAULT)).model_validate(value)
        return handler(value)

    def rules(self) -> tuple[Rule, ...]:
        """Return how parameters are updated; the first rule is that of the matrices, and together they take all."""
        raise NotImplementedError

    @property
    def state_bytes(self) -> int:
        """Bytes of state a parameter, as matrices have it, beside MAIN_BYTES: what planning counts."""
        return 4 * len(self.rules()[0].state)

    def rule_of(self, name: str, parameter: "Tensor") -> Rule:
        """Return the rule that a parameter follows."""
        return next(rule for rule in self.rules() if rule.takes(name, parameter))


def names() -> list[str]:
    """Return the values of optimizer.name: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: object) -> type[OptimizerConfig]:
    """Return the section of an optimizer. Raises ConfigError if no file is called so."""
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"optimizer.name={name} is no optimizer: there are {', '.join(names())}.{hint}")
    return importlib.import_module(f"{__name__}.{name}").OPTIMIZER
