"""The merge kernels, one file per family, each bound to its catalogue entry.

Importing this package loads torch and registers every kernel.
"""

from evomerge.merging.methods import affine, sparse
from evomerge.merging.methods.base import KERNELS, Kernel, Sources, Values

__all__ = ["KERNELS", "Kernel", "Sources", "Values", "affine", "sparse"]
