"""One model shared by many processes: layouts and their mesh, and norms over sharded features."""

from sdd.parallel.layout import ParallelConfig, layouts
from sdd.parallel.mesh import build_mesh

__all__ = ["ParallelConfig", "build_mesh", "layouts"]
