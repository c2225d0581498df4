"""The registry, the settings, the dimensions and the packing of arrays."""

import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from evomerge.errors import ConfigError
from evomerge.optimizers import OPTIMIZERS, SETTINGS, Optimizer, create, settings_of
from evomerge.optimizers.packing import pack, unpack
from evomerge.spaces.dimensions import Dimension

SPACE = (Dimension("x", "real"),)


def test_importing_the_registry_loads_no_library():
    code = (
        "import sys, evomerge.optimizers as o; o.settings_of('optuna')(sampler='gp');"
        "o.create('random', [o.Dimension('x', 'real')], 1).ask();"
        "print([m for m in ('cmaes', 'optuna', 'torch', 'ray', 'scipy', 'sqlalchemy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_tpe_and_cma_es_load_no_torch():
    code = (
        "import sys, evomerge.optimizers as o; d = [o.Dimension('x', 'real')];"
        "[o.create(n, d, 1).ask() for n in ('cma_es', 'optuna')];"
        "print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False False"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_has_a_class_and_documented_settings(name):
    module, _, kind = OPTIMIZERS[name].partition(":")
    assert issubclass(getattr(importlib.import_module(module), kind), Optimizer)
    assert OPTIMIZERS.keys() == SETTINGS.keys()
    for field in dataclasses.fields(settings_of(name)):
        assert field.metadata["doc"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cmaes", {}, 'optimizer.name: unknown optimizer "cmaes"; did you mean "cma_es"?'),
        ("cma_es", {"sgima": 1}, 'optimizer.sgima: unknown setting of "cma_es"; did you mean "sigma"?'),
        ("random", {"x": 1}, 'optimizer.x: unknown setting of "random"'),
        ("cma_es", {"sigma": 0.0}, "optimizer.sigma: must be above 0 and at most 1, got 0.0"),
        ("cma_es", {"sigma": 1.5}, "optimizer.sigma: must be above 0 and at most 1, got 1.5"),
        ("cma_es", {"sigma": float("nan")}, "optimizer.sigma: must be a finite number, got nan"),
        ("cma_es", {"sigma": "0.1"}, "optimizer.sigma: must be a finite number, got '0.1'"),
        ("cma_es", {"sigma": None}, "optimizer.sigma: must be a finite number, got None"),
        ("cma_es", {"population": 1}, "optimizer.population: must be 2 or more, got 1"),
        ("cma_es", {"population": 8.0}, "optimizer.population: must be a whole number, got 8.0"),
        ("cma_es", {"population": True}, "optimizer.population: must be a whole number, got True"),
        ("cma_es", {"lr_adapt": 1}, "optimizer.lr_adapt: must be true or false, got 1"),
        ("cma_es", {"restart_after": 0}, "optimizer.restart_after: must be 1 or more, got 0"),
        ("cma_es", {"separable_above": -1}, "optimizer.separable_above: must be 0 or more, got -1"),
        ("cma_es", {"population_growth": 0.5}, "optimizer.population_growth: must be 1 or more, got 0.5"),
        (
            "optuna",
            {"sampler": "tp"},
            "optimizer.sampler: must be one of tpe, gp, cmaes, nsga2, qmc, got 'tp'",
        ),
        ("optuna", {"startup": 0}, "optimizer.startup: must be 1 or more, got 0"),
        (
            "optuna",
            {"sampler": "qmc", "startup": 5},
            "optimizer.startup: has no effect with sampler qmc, only with tpe, gp, cmaes",
        ),
        (
            "optuna",
            {"sampler": "qmc", "sequence": "x"},
            "optimizer.sequence: must be one of sobol, halton, got 'x'",
        ),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(ConfigError) as caught:
        create(name, SPACE, 1, settings)
    assert str(caught.value) == message


def test_whole_numbers_pass_for_real_settings():
    assert create("cma_es", SPACE, 1, {"sigma": 1, "population_growth": 2}).ask() is not None


def test_dimensions_check_themselves():
    for kind, size in (("real", 3), ("integer", 0), ("categorical", -1), ("complex", 1)):
        with pytest.raises(ValueError, match="dimension x"):
            Dimension("x", kind, size)
    assert not Dimension("x", "integer", 3).holds(1.5)
    assert not Dimension("x", "integer", 3).holds(3.0)
    assert not Dimension("x", "real").holds(float("nan"))
    assert not Dimension("x", "integer", 3).holds(float("nan"))


@given(
    arrays.arrays(
        st.sampled_from(["<f8", ">f8", "<f4", "<i8", "|b1"]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_packed_arrays_come_back_bit_for_bit(array):
    back = unpack(json.loads(json.dumps(pack({"a": array, "n": 3, "l": [1.5]}), allow_nan=False)))
    assert back["a"].shape == array.shape
    assert back["a"].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
    assert (back["n"], back["l"]) == (3, [1.5])
    back["a"][...] = 0


def test_packed_objects_are_refused():
    with pytest.raises(ValueError, match="objects"):
        unpack({"a": {"dtype": "|O", "shape": [1], "bytes": ""}})


def test_packing_ignores_memory_order():
    array = np.arange(6.0).reshape(2, 3)
    assert pack({"a": array}) == pack({"a": np.asfortranarray(array)})
