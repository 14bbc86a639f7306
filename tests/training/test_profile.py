"""Some steps are traced where that is asked for."""

import gzip
import json

import jax
import jax.numpy as jnp

from favchat_jax.training.profile import WARM_UP, tracing


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
