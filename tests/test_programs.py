"""Compiled programs and their traces are kept for later processes."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from favchat_jax import programs
from favchat_jax.programs import Traces, keep_programs, kept


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


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


jax.export.register_namedtuple_serialization(Pair, serialized_name="tests.Pair")


def scale(pair, numbers, *, times):
    """The function that is kept."""
    return Pair(pair.first * numbers["x"] * times, pair.second - 1)


def not_traced(pair, numbers, *, times):
    raise AssertionError("it is traced")


ARGUMENTS = Pair(jnp.ones(3), jnp.arange(2)), {"x": jnp.full(3, 2.0)}


def run(function, folder, model="m", times=5, arguments=ARGUMENTS):
    made = kept(jax.jit(function, static_argnames="times"), "scale", Traces(folder, model))
    return [leaf.tolist() for leaf in made(*arguments, times=times)]


@pytest.fixture
def folder(tmp_path):
    """A folder with the trace of `scale`."""
    assert run(scale, tmp_path) == [[10, 10, 10], [-1, 0]]
    return tmp_path


def test_a_trace_that_was_kept_is_not_made_again(folder):
    assert run(not_traced, folder) == [[10, 10, 10], [-1, 0]]


@pytest.mark.parametrize(
    "changes",
    [{"model": "another"}, {"times": 6}, {"arguments": (Pair(jnp.ones(1), jnp.arange(2)), {"x": jnp.ones(1)})}],
)
def test_another_model_or_other_arguments_have_their_own_trace(changes, folder):
    with pytest.raises(AssertionError, match="it is traced"):
        run(not_traced, folder, **changes)


def test_code_that_was_changed_has_its_own_trace(folder, monkeypatch):
    monkeypatch.setattr(programs, "_code", lambda: "changed")
    with pytest.raises(AssertionError, match="it is traced"):
        run(not_traced, folder)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: b"", lambda content: b"x\n" + content]
)
def test_a_damaged_trace_is_made_again(damage, folder):
    (file,) = (folder / "traces").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert run(scale, folder) == [[10, 10, 10], [-1, 0]] == run(not_traced, folder)


def test_the_traces_used_last_are_kept(folder, monkeypatch):
    monkeypatch.setattr(programs, "MOST", 2)
    for times in (6, 7):
        run(not_traced, folder)  # used again, so it stays
        run(scale, folder, times=times)
    assert len(list((folder / "traces").iterdir())) == 2
    run(not_traced, folder), run(not_traced, folder, times=7)


def test_a_trace_that_may_only_be_read_is_used(folder, monkeypatch):
    def refuse(path):
        raise PermissionError

    monkeypatch.setattr(type(folder), "touch", refuse)
    assert run(not_traced, folder) == [[10, 10, 10], [-1, 0]]


def test_numbers_of_another_precision_have_their_own_trace(folder):
    with jax.default_matmul_precision("float32"), pytest.raises(AssertionError, match="it is traced"):
        run(not_traced, folder)


def test_a_folder_that_takes_no_files_and_a_program_that_cannot_be_kept_do_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert run(scale, tmp_path / "file") == [[10, 10, 10], [-1, 0]]

    def refuse(function):
        raise ValueError("custom calls without compatibility guarantees")

    monkeypatch.setattr(jax.export, "export", refuse)
    assert run(scale, tmp_path) == [[10, 10, 10], [-1, 0]]
    assert not (tmp_path / "traces").exists()


def test_a_program_that_jax_cannot_export_runs_and_is_named(tmp_path, caplog):
    def asks_python(pair, numbers, *, times):
        doubled = jax.pure_callback(lambda x: x * 2, jax.ShapeDtypeStruct((3,), jnp.float32), pair.first)
        return Pair(doubled * times, pair.second)

    with caplog.at_level(logging.INFO, logger="favchat_jax"):
        assert run(asks_python, tmp_path) == [[10, 10, 10], [0, 1]]
    assert "scale is traced anew at each start, since JAX cannot export it: " in caplog.text
    assert not (tmp_path / "traces").exists()
