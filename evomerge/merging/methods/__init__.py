"""The merge kernels, one file per family, each bound to its catalogue entry.

Importing this package loads torch and registers every kernel.
"""

from importlib import import_module
from pkgutil import iter_modules

from evomerge.merging.methods.base import KERNELS, Kernel, Sources, Values

__all__ = ["KERNELS", "Kernel", "Sources", "Values"]

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
