"""Estimates the calls and the cost of a run before the first call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from favchat_jax.corpus import clip_frames
from favchat_jax.corpus.calls import Calls, Reply, Total
from favchat_jax.corpus.describe import PROMPTS, STEPS, Clip, Describer, Unannotated
from favchat_jax.corpus.endpoint import IMAGE_TOKENS, Limits

PAPER_VIDEOS = 61_007  # 35,666 of CelebV-HQ and 25,341 others
# Tokens per answer and seconds per call, roughly those of GPT-4o. After the folder's first calls, their means are used.
OUTPUT_TOKENS = {"features": 350, "summary": 110, "questions": 220}
SECONDS = 4.0
SHORT_TEXT = 60  # tokens of a clip's labels


class _Unknown(Exception):
    """Raised for a call that has not been made yet."""


class _Known:
    """Answers calls from the stored replies."""

    def __init__(self, calls: Calls):
        self._calls = calls

    def ask(self, step: str, key: str, system: str, text: str, images: Callable[[], Sequence[bytes]]) -> Reply:
        """See `describe.Responder`."""
        reply = self._calls.find(key)
        if reply is None:
            raise _Unknown(step)
        return reply


@dataclass
class Work:
    """Holds an amount of work in clips, calls and tokens."""

    clips: int = 0
    calls: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0

    def add(self, steps: Sequence[str], expected: Mapping[str, Total]) -> None:
        """Adds a clip that still needs these steps."""
        self.clips += 1
        for step in steps:
            total = expected[step]
            self.calls += total.calls
            self.input_tokens += total.input_tokens
            self.output_tokens += total.output_tokens


def forecast(
    clips: Iterable[tuple[Clip, Sequence[str]]], calls: Calls, model: str, attempts: int, limits: Limits
) -> str:
    """Returns a table of the work left for `clips`, each with its refused texts, and for the paper's videos."""
    known = Describer(_Known(calls), model, attempts)
    ahead = [(clip, _steps_left(known, clip, refused)) for clip, refused in clips]
    left, full, made = Work(), Work(), calls.totals()
    reached = {step: sum(step not in steps for _, steps in ahead) for step in STEPS}
    answers = {step: made[step].calls / reached[step] if step in made and reached[step] else 1.0 for step in STEPS}
    for clip, steps in ahead:
        expected = _expected(clip, made, answers)
        full.add(STEPS, expected)
        if steps:
            left.add(steps, expected)
    seconds = sum(total.seconds for total in made.values()) / max(1, sum(total.calls for total in made.values()))
    paid = limits.dollars(sum(t.input_tokens for t in made.values()), sum(t.output_tokens for t in made.values()))
    scale = PAPER_VIDEOS / max(1, full.clips)
    paper = Work(PAPER_VIDEOS, full.calls * scale, full.input_tokens * scale, full.output_tokens * scale)
    head = f"{'':<13} {'clips':>7} {'calls':>9} {'input tokens':>14} {'output tokens':>14} {'dollars':>10} {'hours':>7}"
    rows = [_row(name, work, limits, seconds or SECONDS) for name, work in (("to do", left), ("like these", paper))]
    basis = "means of the calls made so far" if made else "no calls so far: lengths and times are assumed"
    pace = f"{limits.concurrency} calls at a time, at most {limits.calls_per_minute:g} a minute"
    return "\n".join([head, *rows, f"paid so far: ${paid:.2f}; {basis}; {pace}, {seconds or SECONDS:.1f} s each"])


def _row(name: str, work: Work, limits: Limits, seconds: float) -> str:
    dollars = limits.dollars(work.input_tokens, work.output_tokens)
    hours = work.calls * max(seconds / limits.concurrency, 60 / limits.calls_per_minute) / 3600
    return (
        f"{name:<13} {work.clips:>7,} {work.calls:>9,.0f} {work.input_tokens:>14,.0f} {work.output_tokens:>14,.0f} "
        f"{dollars:>10,.2f} {hours:>7,.2f}"
    )


def _steps_left(known: Describer, clip: Clip, refused: Sequence[str]) -> Sequence[str]:
    try:
        known.write(clip, refused)
    except _Unknown as missing:
        return STEPS[STEPS.index(str(missing)) :]
    except Unannotated:  # its answers are stored, but were unusable
        return ()
    return ()


def _expected(clip: Clip, made: Mapping[str, Total], answers: Mapping[str, float]) -> dict[str, Total]:
    """Returns the expected work of each step; `answers` is its mean number per clip, including refused ones."""
    pictures = IMAGE_TOKENS * clip_frames.count(clip.frames)
    output = {
        step: made[step].output_tokens / made[step].calls if step in made else OUTPUT_TOKENS[step] for step in STEPS
    }
    known = {"features": 0, "summary": output["features"], "questions": output["features"] + output["summary"]}
    return {
        step: Total(
            calls=answers[step],
            input_tokens=answers[step] * (_prompt_tokens(step) + known[step] + (step != "questions") * pictures),
            output_tokens=answers[step] * output[step],
            seconds=0,
        )
        for step in STEPS
    }


def _prompt_tokens(step: str) -> float:
    wording = (PROMPTS["system.md"], PROMPTS[f"{step}.md"], PROMPTS.get(f"{step}.schema.json", ""))
    return SHORT_TEXT + sum(map(len, wording)) / 4
