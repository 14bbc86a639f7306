"""Checks a GPU or TPU: python -m tools.accelerator_check --json=check.json --minutes=8

From weights drawn on the device, without data or network, it measures

about    the card, and the rates that it reaches in arithmetic and in memory
kernels  each form of attention at the paper's sizes, in values, gradients and time, beside the plain form
losses   the first losses of the embedded preset, beside those of a CPU
answers  answers to one and to eight questions and a group of responses: tokens a second, and PyTorch's in turns
forms    answers with int8 kernels, and a group of responses with the weights that train
stage2   a training step: seconds, share of the card's rate, memory beside the plan's, and PyTorch's step in turns
stage3   a training step as of stage2

Each part runs in a process of its own, and a part that fails or is out of time leaves the others as they are. The file
is written after each part; a second run with --only=PART,... replaces these parts in it.
"""

import contextlib
import datetime
import json
import os
import platform as machine
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from absl import flags

from configs.common import PRESETS
from favchat_jax import command_line
from favchat_jax.errors import RunError, UserError
from favchat_jax.files import replace_file
from favchat_jax.planning.targets import GIB, of_device

# Part -> how much of the time it gets, relative to the others.
WEIGHTS = {"about": 1, "kernels": 2, "losses": 2, "answers": 4, "forms": 2, "stage2": 4, "stage3": 3}
LONGER = 1.3  # a part may take this much longer than its share, since others may take less
# XLA otherwise times many variants of each product on the card, which takes minutes for a step; cuBLAS chooses well.
QUICK = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
FEWEST = 20.0  # seconds in which no part is begun
CORES = 8  # from so many on, the training steps compile while other parts run
Report = dict[str, Any]


def check(preset: str, platform: str, minutes: float, parts: Sequence[str], file: Path | None) -> Report:
    """Runs parts one after the other; returns the report, which the file holds after each of them."""
    end = time.monotonic() + 60 * minutes
    report = {"parts": {}, **_kept(file, preset)} if file else {"parts": {}}
    report |= {"preset": preset, "date": datetime.date.today().isoformat(), "machine": machine.machine()}
    environment = {"XLA_FLAGS": QUICK, **os.environ}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # both sides share the card
    if platform:
        environment |= {"JAX_PLATFORMS": platform}
    if platform == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_end:
        environment = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled", **environment}
        ahead = _compile_ahead(preset, parts, Path(folder), environment, at_end)
        for number, part in enumerate(parts):
            left = end - time.monotonic()
            share = WEIGHTS[part] / sum(WEIGHTS[other] for other in parts[number:])
            seconds = left * min(1.0, LONGER * share)
            started = time.monotonic()
            outcome = {"rows": [], "failed": "no time was left"}
            if seconds > FEWEST:
                waited = _wait(ahead.get(part, []), 0.8 * seconds)
                outcome = _run(part, preset, seconds - waited, Path(folder), environment)
            report["parts"][part] = {**outcome, "wall_seconds": time.monotonic() - started}
            print(describe(part, report), flush=True)
            if file:
                replace_file(file, json.dumps(report, indent=1) + "\n")
    return report


def _compile_ahead(
    preset: str, parts: Sequence[str], folder: Path, environment: dict[str, str], at_end: contextlib.ExitStack
) -> dict[str, list[subprocess.Popen]]:
    """Starts processes that compile the training steps into the cache, since that takes minutes at the paper's size.

    Args:
        preset: sizes of the model.
        parts: of the check.
        folder: for files of the processes.
        environment: of the processes.
        at_end: ends the processes.

    Returns:
        The processes by part; none on a machine with few cores, whose other parts they would slow down.
    """
    ahead: dict[str, list[subprocess.Popen]] = {}
    if (os.cpu_count() or 1) >= CORES:
        for stage in (part for part in parts if part.startswith("stage")):
            for setting in ("given", "none"):
                own = str(folder / f"{stage}-{setting}")
                command = [sys.executable, "-m", "tools.on_accelerator", "compile", preset, stage, setting, own]
                ahead.setdefault(stage, []).append(
                    at_end.enter_context(_group(command, environment, subprocess.DEVNULL))
                )
    return ahead


def _wait(processes: list[subprocess.Popen], seconds: float) -> float:
    """Waits for processes, for at most some seconds; returns the seconds that it waited."""
    started = time.monotonic()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, seconds - (time.monotonic() - started)))
    return time.monotonic() - started


def _run(part: str, preset: str, seconds: float, folder: Path, environment: dict[str, str]) -> Report:
    """Runs a part in its own process group; returns its rows, and how it failed if it did."""
    file = folder / f"{part}.json"
    # The part itself begins nothing new after four fifths of the time.
    command = [sys.executable, "-m", "tools.on_accelerator", part, preset, str(0.8 * seconds), str(folder), str(file)]
    with open(folder / f"{part}.log", "w+") as log, _group(command, environment, log) as process:
        failed = ""
        try:
            if process.wait(timeout=seconds):
                failed = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"stopped after {seconds:.0f} s"
        log.seek(0)
        said = log.read().strip()
    outcome: Report = {"rows": json.loads(file.read_text()) if file.exists() else [], "log": said[-4000:]}
    return {**outcome, "failed": f"{failed}: {said.splitlines()[-1] if said else 'no message'}"} if failed else outcome


@contextlib.contextmanager
def _group(command: list[str], environment: dict[str, str], log: IO[str] | int) -> Iterator[subprocess.Popen]:
    """Starts a process, and ends it and all that it started when the block ends in any way."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kept(file: Path, preset: str) -> Report:
    """Returns the parts of an earlier run in the file, if there is one.

    Raises:
        UserError: the file is of another kind, or of another preset.
    """
    if not file.exists():
        return {}
    try:
        report = json.loads(file.read_text())
        parts, earlier = dict(report["parts"]), report["preset"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--json={file} holds no accelerator check: name another file, or delete it") from None
    if earlier != preset:
        raise UserError(f"--json={file} holds a check with --preset={earlier}: name another file, or delete it")
    return {"parts": parts}


def describe(part: str, report: Report) -> str:
    """Returns a part's results as lines of text."""
    outcome = report["parts"][part]
    about = (report["parts"].get("about", {}).get("rows") or [{}])[0]
    write = {"about": _about, "kernels": _kernel, "losses": _losses, "answers": _answer, "forms": _answer}.get(
        part, _step
    )
    lines = [
        f"  {row['side']}, {row['setting']}: {row['failed']}" if "failed" in row else write(row, about)
        for row in outcome["rows"]
    ]
    failed = f", FAILED: {outcome['failed']}" if "failed" in outcome else ""
    return "\n".join([f"{part} ({outcome['wall_seconds']:.0f} s){failed}", *lines])


def _about(row: Report, _: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    reached = f"{row['flops_a_second'] / 1e12:.0f} TFLOP/s in bfloat16, {row['bytes_a_second'] / 1e9:.0f} GB/s"
    return f"  {row['device']}: {reached}, {row['usable_bytes'] / GIB:.1f} GiB for JAX; {versions}"


def _kernel(row: Report, _: Report) -> str:
    verdict = "right" if row["right"] else "WRONG"
    line = f"  {row['attention']} ({row['kernel']}): {verdict}, error {row['error']:.1e}"
    if "gradient_error" in row:
        line += f", of gradients {row['gradient_error']:.1e}"
    line += f"; {1e3 * row['seconds']:.2f} ms"
    return line + (f", plain {1e3 * row['plain_seconds']:.2f} ms" if "plain_seconds" in row else "")


def _losses(row: Report, _: Report) -> str:
    found, recorded = (" ".join(f"{loss:.5f}" for loss in row[name]) for name in ("losses", "recorded"))
    return f"  {'right' if row['right'] else 'WRONG'}: {found}; on a CPU {recorded}"


def _step(row: Report, about: Report) -> str:
    line = f"  {row['side']}, {row['setting']}: {row['seconds']:.3f} s a step (first {row['first_seconds']:.0f} s)"
    target = of_device(about.get("device", ""))
    if "flops" in row and target:
        line += f", {row['flops'] / row['seconds'] / target.flops:.1%} of the card's rate"
    return line + _memory(row)


def _answer(row: Report, about: Report) -> str:
    line = f"  {row['side']}, {row['setting']}: {row['tokens'] / row['seconds']:.0f} tokens a second with all,"
    line += f" {1e3 * row['seconds_a_token']:.2f} ms a token, prompt {1e3 * row['prompt_seconds']:.0f} ms,"
    line += f" clip {1e3 * row['encode_seconds']:.0f} ms"
    if "weight_bytes" in row and "bytes_a_second" in about:
        share = row["weight_bytes"] / row["seconds_a_token"] / about["bytes_a_second"]
        line += f", {share:.0%} of the memory's rate"
    return line + _memory(row)


def _memory(row: Report) -> str:
    line = f", peak {row['peak_bytes'] / GIB:.1f} GiB" if row.get("peak_bytes") else ""
    return line + (f", planned {row['planned_bytes'] / GIB:.1f} GiB" if "planned_bytes" in row else "")


def main() -> None:
    """Checks this machine."""
    parts = _ONLY.value or list(WEIGHTS)
    for part in parts:
        if part not in WEIGHTS:
            raise UserError(f"--only={part} is no part: choose from {', '.join(WEIGHTS)}")
    if _JSON.value:
        command_line.check_output("--json", _JSON.value)
    report = check(_PRESET.value, _PLATFORM.value, _MINUTES.value, parts, Path(_JSON.value) if _JSON.value else None)
    outcomes = [report["parts"][part] for part in parts]
    wrong = [row for outcome in outcomes for row in outcome["rows"] if not row.get("right", True)]
    failed = [part for part in parts if "failed" in report["parts"][part]]
    if wrong or failed:
        raise RunError(f"{len(wrong)} results are wrong, and these parts failed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    _JSON = flags.DEFINE_string("json", None, "File for the figures")
    _MINUTES = flags.DEFINE_float("minutes", 8.0, "Longest time of the whole check", lower_bound=0.5)
    _PRESET = flags.DEFINE_enum("preset", "paper", PRESETS, "Sizes of the model")
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "JAX's platform, such as cpu for a rehearsal; by default its choice"
    )
    _ONLY = flags.DEFINE_list("only", [], "Parts to run; by default, all")
    command_line.start(main)
