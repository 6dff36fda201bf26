"""What a conversion is to do, before anything is changed; all modes carry out the same plan."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from sdd.conversion.become import become_sdd, described, leave_fused_inference
from sdd.conversion.calibrate import Norms
from sdd.conversion.experts import SDDExperts, become_sdd_experts
from sdd.conversion.kinds import features
from sdd.conversion.match import Selection
from sdd.conversion.report import ConvertedLayer
from sdd.nn import SDDLinear
from sdd.norm_groups import resolve_group


@dataclass(frozen=True)
class Plan:
    """The layers to convert, with their norms and initial alphas.

    Attributes:
        model: the model.
        selection: its layers.
        alphas: initial alpha of each layer and each stack of experts' matrices, by name.
        eps: added to the mean square, inside the root.
        n_layers: L.
    """

    model: nn.Module
    selection: Selection
    alphas: Mapping[str, float]
    eps: float
    n_layers: int

    def norms(self) -> dict[str, Norms]:
        """The norm of each layer."""
        return {
            name: Norms(resolve_group(self.selection.groups.get(name), features(layer)[1]), self.eps)
            for name, layer in self.selection.linears.items()
        }

    def carry_out(self) -> dict[str, SDDLinear | SDDExperts]:
        """Turn every layer into an SDD layer with its initial alpha; V and b keep their values.

        Returns:
            The modules by name: layers, then the modules that hold stacked experts.
        """
        norms = self.norms()
        found: dict[str, SDDLinear | SDDExperts] = {
            name: become_sdd(layer, norms[name], self.alphas[name]) for name, layer in self.selection.linears.items()
        }
        stacks: dict[nn.Module, dict[str, str]] = {}
        for name, (module, key) in self.selection.experts.items():
            stacks.setdefault(module, {})[key] = name
        for module, keys in stacks.items():
            name = next(iter(keys.values())).rpartition(".")[0]
            found[name] = become_sdd_experts(module, {key: self.alphas[full] for key, full in keys.items()}, self.eps)
        leave_fused_inference(self.model)
        return found

    def lines(self, modules: Mapping[str, SDDLinear | SDDExperts]) -> list[ConvertedLayer]:
        """The lines of the report for the modules that are converted, in the model's order."""
        selection = self.selection
        names = {name: name for name in selection.linears}
        names |= {name: name.rpartition(".")[0] for name in selection.experts}
        return [
            described(name, modules[names[name]], name in selection.outputs, outside=name in selection.outside)
            for name in sorted(names, key=selection.order.__getitem__)
            if names[name] in modules
        ]


def parameters_of(model: nn.Module) -> int:
    """How many elements the parameters of a model have; those of lazy layers are not known yet."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
