"""Named random streams."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.seeding import derive, stream

PURPOSE = st.lists(st.one_of(st.text("abc_", max_size=4), st.integers(0, 99)), max_size=3)


def test_seeds_are_the_same_on_every_machine():
    # From sha256("0"), sha256("7\x1fcma_es\x1f3"): these must never change, or old runs cannot be resumed.
    assert derive(0) == 0x5FECEB66FFC86F38 >> 1
    assert derive(7, "cma_es", 3) == 2498860454396536895


@given(st.integers(0, 2**63 - 1), PURPOSE)
def test_a_seed_fits_a_signed_64_bit_column(seed, purpose):
    assert 0 <= derive(seed, *purpose) < 2**63


@given(st.tuples(st.integers(0, 9), PURPOSE), st.tuples(st.integers(0, 9), PURPOSE))
def test_other_purposes_give_other_seeds(one, other):
    written = [[str(seed), *map(str, purpose)] for seed, purpose in (one, other)]
    assert (derive(one[0], *one[1]) == derive(other[0], *other[1])) == (written[0] == written[1])


def test_equal_arguments_give_equal_draws_in_any_order_of_use():
    first = stream(1, "a", 2)
    stream(1, "a", 3).random(5)
    assert first.random(4).tolist() == stream(1, "a", 2).random(4).tolist()
    assert stream(1, "a", 2).random() != stream(1, "a", 3).random()


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_seeds_do_not_depend_on_the_interpreters_hash_seed(hash_seed):
    code = "from evomerge.seeding import stream; print(stream(3, 'x', 1).random())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
    )
    assert float(run.stdout) == stream(3, "x", 1).random()
