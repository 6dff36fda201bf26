"""Layers of published models that are known to be read without a call: the second net under the proof.

Some of this code runs only where a kernel of another package is installed, or with some arguments, so that an example
may not show it.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import nn

from sdd.conversion.kinds import told

_READ = "its model reads the weight without calling the layer"
_SCALED = "its model rescales the weight for evaluation"

#: The class that owns the layer as `module.name` (a glob), the layer's name in it, and the reason to leave it.
KNOWN = (
    *(
        (f"transformers.*.{owner}", layer, _READ)
        for owner, layers in {
            "*MambaMixer": ("x_proj", "dt_proj", "out_proj"),
            "*Mamba2Mixer": ("out_proj",),
            "BambaMixer": ("out_proj",),
            "FalconH1Mixer": ("out_proj",),
            "GraniteMoeHybridMambaLayer": ("out_proj",),
            "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "*MHAttentionMap": ("k_proj",),
            "DabDetrMHAttentionMap": ("k_linear",),
            "LSHSelfAttention": ("query_key",),
            "MobileBertLMPredictionHead": ("dense", "decoder"),
            "NeoMMEForMaskedLM": ("unembedding_projection",),
            "Gemma3nTextAltUp": ("prediction_coefs", "correction_coefs"),
        }.items()
        for layer in layers
    ),
    ("transformers.*.RwkvSelfAttention", "output", _SCALED),
    ("transformers.*.RwkvFeedForward", "value", _SCALED),
    ("timm.models.beit.Attention", "qkv", _READ),
    ("timm.models.eva.EvaAttention", "qkv", _READ),
    ("timm.models.swin_transformer_v2.WindowAttention", "qkv", _READ),
    ("torchvision.models.swin_transformer.ShiftedWindowAttention*", "qkv", _READ),
    ("torchvision.models.swin_transformer.ShiftedWindowAttention*", "proj", _READ),
)
#: The same for classes whose attribute, the last entry, must be true.
KNOWN_IF = (
    ("transformers.*.BloomAttention", "dense", _READ, "slow_but_exact"),
    ("transformers.*.BloomMLP", "dense_4h_to_h", _READ, "slow_but_exact"),
)


def known_readers(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers to leave, by the name under which they are given, with the reason."""
    names = {layer: name for name, layer in linears.items()}
    found = {}
    for owner in model.modules():
        kind = f"{type(owner).__module__}.{type(owner).__qualname__}"
        for child, layer in owner.named_children():
            for reason in _reasons(kind, child, owner) if layer in names else ():
                found[names[layer]] = reason
    return found


def _reasons(kind: str, child: str, owner: nn.Module) -> Iterator[str]:
    for pattern, layer, reason, *needs in (*KNOWN, *KNOWN_IF):
        if layer == child and fnmatchcase(kind, pattern) and all(told(owner, name, False) for name in needs):
            yield reason
