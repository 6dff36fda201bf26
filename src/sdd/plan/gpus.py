"""GPUs by name, as their vendors' datasheets give them."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sdd.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """Peaks and memory of one GPU by its datasheet; peaks are dense, i.e. half of those printed "with sparsity".

    Attributes:
        name: the value of `--gpu`.
        bfloat16: peak of bfloat16 matrix products with float32 accumulation, TFLOP/s.
        float32: peak of plain float32 (no TF32, which torch leaves off), TFLOP/s.
        memory: GB as printed, which for GPU memory are GiB.
        bandwidth: of the memory, GB/s.
        link: to other GPUs of the node, GB/s in one direction: NVLink or Infinity Fabric, else PCIe x16. Half of what
            datasheets print for both directions.
        network: to other nodes, GB/s in one direction: an InfiniBand adapter for each GPU, 400 Gb/s (NDR) or, for GPUs
            of PCIe 4, 200 Gb/s (HDR), as in the vendors' reference systems.
        source: the datasheet.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str

    def peak(self, precision: str) -> float:
        """Peak of matrix products in "bfloat16" or "float32", in FLOP/s."""
        return 1e12 * (self.bfloat16 if precision == "bfloat16" else self.float32)


_TABLE = (
    Gpu("A100-40", 312, 19.5, 40, 1555, 300, 25, "NVIDIA A100 datasheet, SXM 40 GB"),
    Gpu("A100-80", 312, 19.5, 80, 2039, 300, 25, "NVIDIA A100 datasheet, SXM 80 GB"),
    Gpu("H100-SXM", 989, 67, 80, 3350, 450, 50, "NVIDIA H100 datasheet"),
    Gpu("H100-PCIe", 756, 51, 80, 2000, 64, 50, "NVIDIA H100 datasheet"),
    Gpu("H100-NVL", 835, 60, 94, 3900, 64, 50, "NVIDIA H100 datasheet"),
    Gpu("H200", 989, 67, 141, 4800, 450, 50, "NVIDIA H200 datasheet, SXM"),
    Gpu("B200", 2250, 80, 180, 8000, 900, 50, "NVIDIA Blackwell architecture brief, HGX B200"),
    Gpu("L4", 121, 30.3, 24, 300, 32, 25, "NVIDIA L4 datasheet"),
    Gpu("L40S", 362, 91.6, 48, 864, 32, 25, "NVIDIA L40S datasheet"),
    Gpu("A10", 125, 31.2, 24, 600, 32, 25, "NVIDIA A10 datasheet"),
    Gpu("A40", 149.7, 37.4, 48, 696, 32, 25, "NVIDIA A40 datasheet"),
    Gpu("RTX-3090", 71, 35.6, 24, 936, 32, 25, "NVIDIA GA102 architecture whitepaper"),
    Gpu("RTX-4090", 165.2, 82.6, 24, 1008, 32, 25, "NVIDIA Ada architecture whitepaper"),
    Gpu("RTX-5090", 209.5, 104.8, 32, 1792, 64, 50, "NVIDIA RTX Blackwell architecture whitepaper"),
    Gpu("MI300X", 1307.4, 163.4, 192, 5300, 448, 50, "AMD Instinct MI300X datasheet"),
    Gpu("MI325X", 1307.4, 163.4, 256, 6000, 448, 50, "AMD Instinct MI325X datasheet"),
)
#: Known GPUs by name.
gpus: Mapping[str, Gpu] = MappingProxyType({gpu.name: gpu for gpu in _TABLE})
# for GPUs that drivers name differently
_DRIVER_NAMES = {"A100-40": r"\bA100.*40GB", "A100-80": r"\bA100.*80GB", "H100-SXM": r"\bH100.*HBM3"}


def find_gpu(name: str) -> Gpu:
    """Find a GPU by name, in any case and with any separators.

    Raises:
        UserError: if the table does not have it; the message has the nearest names.
    """
    by_key = {_key(known): gpu for known, gpu in gpus.items()}
    if _key(name) in by_key:
        return by_key[_key(name)]
    near = difflib.get_close_matches(_key(name), by_key, n=3, cutoff=0.4)
    hint = f" (did you mean {' or '.join(by_key[key].name for key in near)}?)" if near else ""
    raise UserError(f"no GPU {name!r} in the table{hint}: choose one of {', '.join(gpus)}")


def gpu_of_device(name: str) -> Gpu | None:
    """Find a GPU by the name that its driver reports, e.g. "NVIDIA H100 80GB HBM3"; None if the table lacks it.

    Args:
        name: the result of `torch.cuda.get_device_name`.
    """
    for gpu in gpus.values():
        pattern = _DRIVER_NAMES.get(gpu.name, rf"\b{gpu.name.replace('-', ' ')}\b(?! Ti| NVL| D\b| Laptop)")
        if re.search(pattern, name):
            return gpu
    return None


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
