"""Exported models for transformers' Auto classes, and weight decay in its Trainer.

`import sdd.interop.huggingface`, then `from_pretrained(DIR)` of a folder that `sdd export` wrote.
"""

from typing import Any

from sdd.errors import require_extra
from sdd.optim_groups import alphas_of, warn_if_decayed

require_extra("hf", "transformers", needed_by=__name__)
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sdd.interop.modeling_sdd import SDDConfig, SDDForCausalLM, SDDModel  # noqa: E402

AutoConfig.register(SDDConfig.model_type, SDDConfig, exist_ok=True)
AutoModel.register(SDDConfig, SDDModel, exist_ok=True)
AutoModelForCausalLM.register(SDDConfig, SDDForCausalLM, exist_ok=True)


class UndecayedAlphas:
    """Mixed in before a Trainer's class, it keeps weight decay from the alphas of SDD layers.

    `class MyTrainer(UndecayedAlphas, Trainer): pass` builds the optimiser that the arguments ask for, and every other
    parameter is decayed as before.
    """

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The Trainer's names without those of alphas."""
        trainer: Any = super()
        alphas = set(alphas_of(model))
        kept = {name for name, parameter in model.named_parameters() if parameter in alphas}
        return [name for name in trainer.get_decay_parameter_names(model) if name not in kept]


class AlphaDecayCallback(TrainerCallback):
    """Warns at the beginning of a training whose optimiser decays the alphas of SDD layers."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        """Look at `model` and `optimizer`."""
        warn_if_decayed(of["model"], of["optimizer"])
