"""The six-entry example that the worked numbers of the methods are computed on."""

import numpy as np

BASE = np.ones(6)
TAU = (
    np.array([4, -1, 2, 0, 3, -5.0]),
    np.array([2, 3, -2.5, 1, -4, -1.0]),
    np.array([1, -2, 0.5, -3, 6, 2.5]),
)
