"""The search of the largest microbatch, against trying all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.planning.program import Program, _stated_need
from slm_jax.planning.search import candidate_rows, largest_that_fits
from slm_jax.utils.errors import UserError


def program(rows, needed, state=100):
    return Program(rows, 1, state, 0, needed - state, needed, None, None, 0, (), (), 0.0, "")


def search(memory, candidates, limit, first):
    compiled = []

    def compile_rows(rows):
        compiled.append(rows)
        return program(rows, memory(rows))

    best, programs = largest_that_fits(compile_rows, candidates, limit, first)
    assert [each.rows for each in programs] == compiled
    return best.rows, compiled


def test_candidates_divide_the_batch():
    assert candidate_rows(12) == [1, 2, 3, 4, 6, 12]
    assert candidate_rows(1) == [1]


@given(
    total=st.integers(1, 512),
    fixed=st.integers(100, 10_000),
    slope=st.integers(1, 1000),
    limit=st.integers(1, 200_000),
    bend=st.floats(0.9, 1.1),
    data=st.data(),
)
def test_the_largest_that_fits_is_found_with_few_compilations(total, fixed, slope, limit, bend, data):
    candidates = candidate_rows(total)
    first = data.draw(st.sampled_from(candidates))

    def memory(rows):  # close to linear: the largest candidate needs no accumulated gradients
        return int(fixed + slope * rows * (bend if rows > 16 else 1.0)) - (
            min(fixed, slope * rows) // 4 if rows == total else 0
        )

    fitting = [rows for rows in candidates if memory(rows) <= limit]
    if not fitting:
        with pytest.raises(UserError, match="even with 1 sequence at once"):
            search(memory, candidates, limit, first)
        return
    best, compiled = search(memory, candidates, limit, first)
    assert memory(best) <= limit
    assert len(set(compiled)) == len(compiled) <= 6
    # What is not compiled is predicted: the next candidate can fit only by what a line through two programs misses.
    larger = [rows for rows in fitting if rows > best]
    assert all(memory(rows) > 0.6 * limit for rows in larger)


def test_an_exactly_linear_memory_takes_three_compilations():
    best, compiled = search(lambda rows: 1000 + 50 * rows, candidate_rows(512), 8000, 16)
    assert best == 128
    assert len(compiled) <= 3


def test_what_a_tpu_compiler_states_of_a_program_that_does_not_fit():
    whole = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.17G of 15.75G hbm. Exceeded hbm capacity"
    )
    assert _stated_need(whole, 5) == int(37.17 * 2**30)
    temporary = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (447.18G) "
    assert _stated_need(temporary + "exceeds available HBM (15.75G).", 5) == 5 + int(447.18 * 2**30)
    assert _stated_need("INTERNAL: Used 37.17G of 15.75G hbm", 5) is None
