"""What a conversion is to do, before anything is changed; all modes carry out the same plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy

from sdd.conversion.become import become_sdd, described, leave_fused_inference
from sdd.conversion.closed_form import Norms
from sdd.conversion.expert_fits import Stack
from sdd.conversion.experts import SDDModule, become_sdd_experts
from sdd.conversion.kinds import features
from sdd.conversion.match import Selection
from sdd.conversion.report import ConvertedLayer, KeptLayer
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

    def without(self, reasons: Mapping[str, str]) -> "Plan":
        """The plan without some layers, stacked matrices, or whole modules of experts, which stay for these reasons."""
        selection = self.selection
        found = {name: reasons.get(name, reasons.get(owner)) for name, owner in self._owners().items()}
        kept = [KeptLayer(name, reason) for name, reason in found.items() if reason is not None]
        gone = {layer.name for layer in kept}
        narrower = replace(
            selection,
            linears={name: layer for name, layer in selection.linears.items() if name not in gone},
            experts={name: place for name, place in selection.experts.items() if name not in gone},
            outside=[name for name in selection.outside if name not in gone],
            kept=[*selection.kept, *kept],
        )
        return replace(self, selection=narrower)

    def norms(self) -> dict[str, Norms]:
        """The norm of each layer."""
        return {
            name: Norms(resolve_group(self.selection.groups.get(name), features(layer)[1]), self.eps)
            for name, layer in self.selection.linears.items()
        }

    def stacks(self) -> dict[str, Stack]:
        """The modules of stacked experts by name."""
        found: dict[str, Stack] = {}
        for name, (module, key) in self.selection.experts.items():
            owner = name.rpartition(".")[0]
            names = found[owner].names if owner in found else {}
            found[owner] = Stack(module, {**names, key: name}, self.eps)
        return found

    def carry_out(self) -> dict[str, SDDModule]:
        """Turn every layer into an SDD layer with its initial alpha; V and b keep their values.

        Returns:
            The modules by name, in the model's order; of stacked experts, the module that holds them.
        """
        norms = self.norms()
        found: dict[str, SDDModule] = {
            name: become_sdd(layer, norms[name], self.alphas[name]) for name, layer in self.selection.linears.items()
        }
        for name, stack in self.stacks().items():
            alphas = {key: self.alphas[full] for key, full in stack.names.items()}
            found[name] = become_sdd_experts(stack.module, alphas, self.eps)
        leave_fused_inference(self.model)
        return self.in_order(found)

    def in_order(self, modules: Mapping[str, SDDModule]) -> dict[str, SDDModule]:
        """Converted modules by name, in the model's order."""
        places = {owner: self.selection.order[name] for name, owner in reversed(list(self._owners().items()))}
        return dict(sorted(modules.items(), key=lambda item: places[item[0]]))

    def lines(self, modules: Mapping[str, SDDModule]) -> list[ConvertedLayer]:
        """The lines of the report for the modules that are converted, in the model's order."""
        selection, owners = self.selection, self._owners()
        return [
            described(name, modules[owners[name]], name in selection.outputs, outside=name in selection.outside)
            for name in sorted(owners, key=selection.order.__getitem__)
            if owners[name] in modules
        ]

    def _owners(self) -> dict[str, str]:
        """The name of the module that holds each matrix: a layer its own, the module of experts theirs."""
        experts = {name: name.rpartition(".")[0] for name in self.selection.experts}
        return {name: name for name in self.selection.linears} | experts


def parameters_of(model: nn.Module) -> int:
    """How many elements the parameters of a model have; those of lazy layers are not known yet."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
