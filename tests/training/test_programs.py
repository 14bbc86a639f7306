"""Compiled programs are kept in the workdir, and some steps are traced where that is asked for."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from favchat_jax.training.programs import WARM_UP, keep_programs, tracing


@pytest.fixture
def own_cache(monkeypatch):
    """No cache that the environment names; the tests' own is there again afterwards."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


@pytest.mark.usefixtures("own_cache")
def test_each_workdir_keeps_the_programs_that_are_compiled_for_it(tmp_path):
    for number, stage in enumerate(("stage1", "stage2")):
        keep_programs(tmp_path / stage, seconds=0)
        jax.jit(lambda x, n=number: x * (3 + n))(jnp.ones(2)).block_until_ready()
        assert any(file.name.startswith("jit_") for file in (tmp_path / stage / "compiled").rglob("*"))


@pytest.mark.usefixtures("own_cache")
def test_programs_that_compile_quickly_are_not_kept(tmp_path):
    keep_programs(tmp_path, seconds=1000)
    jax.jit(lambda x: x * 7)(jnp.ones(2)).block_until_ready()
    assert not [file for file in tmp_path.rglob("*") if file.name.startswith("jit_")]


def test_a_cache_that_the_environment_names_stays(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    keep_programs(tmp_path)
    assert jax.config.jax_compilation_cache_dir == before
    assert not list(tmp_path.iterdir())


def test_the_steps_asked_for_and_no_others_are_in_the_trace(tmp_path):
    first, traced, state = 5, 2, jnp.ones(3)
    with tracing(tmp_path, traced, first) as before:
        for step in range(first, first + WARM_UP + traced + 2):
            before(step, state)
            with jax.profiler.TraceAnnotation(f"marked_{step}"):
                state = (state + 1).block_until_ready()
    assert list(tmp_path.rglob("*.xplane.pb")), "what TensorBoard reads"
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    marked = {event["name"] for event in events if str(event.get("name")).startswith("marked_")}
    assert marked == {f"marked_{first + WARM_UP + n}" for n in range(traced)}


def test_without_a_wish_nothing_is_traced(tmp_path):
    with tracing(tmp_path, 0, 0) as before:
        for step in range(5):
            before(step, None)
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_early_leaves_a_whole_trace(tmp_path):
    with tracing(tmp_path, 100, 0) as before:
        for step in range(WARM_UP + 2):
            before(step, jnp.ones(2))
    assert list(tmp_path.rglob("*.xplane.pb"))
