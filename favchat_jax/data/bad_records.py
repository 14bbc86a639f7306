"""Counts the records that a run reads, names the bad ones, and stops a run whose data set has too many."""

import logging
import math
from typing import Any

from favchat_jax.errors import UserError

log = logging.getLogger("favchat_jax")

BAD_SHARE = 0.01  # a larger share of bad records stops the run, since the data set is broken
BAD_AFTER = 100  # records before the share is checked, so that one early bad clip does not stop the run


class BadRecords:
    """Counts records; one that cannot be used is skipped by its reader.

    Args:
        records: number of records that the reader has.

    Attributes:
        seen: number of records read so far, including bad ones.
        bad: number of bad records among them.
        reasons: id -> reason of each bad record.
    """

    def __init__(self, records: int):
        self._records = records
        self.seen = 0
        self.bad = 0
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str | None) -> None:
        """Counts a record; `reason` says why it is bad and is None for a good one.

        Raises:
            UserError: more than 1 % of the records are bad.
        """
        self.seen += 1
        if reason is not None:
            self.bad += 1
            if name not in self.reasons:
                log.warning("record %s is skipped (%d of %d so far): %s", name, self.bad, self.seen, reason)
                self.reasons[name] = reason
        if self.seen >= self._records:  # all records were read, so the share of distinct bad records is exact
            too_many = len(self.reasons) > BAD_SHARE * self._records
        else:  # the share is an estimate, so two standard deviations are tolerated
            expected = BAD_SHARE * self.seen
            too_many = self.bad > expected + 2 * math.sqrt(expected)
        all_are_bad = len(self.reasons) == self._records  # a small data set need not be read again and again
        if all_are_bad or (self.seen >= BAD_AFTER and too_many):
            named = ", ".join(list(self.reasons)[:5]) + (" and others" if len(self.reasons) > 5 else "")
            raise UserError(
                f"{self.bad} of {self.seen} records are bad, more than {BAD_SHARE:.0%}: fix or remove {named} "
                f"(the last: {list(self.reasons.values())[-1]})"
            )

    def get_state(self) -> dict[str, Any]:
        """Returns the counts as JSON."""
        return {"seen": self.seen, "bad": self.bad, "bad_ids": self.reasons}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes at the counts that `get_state` returned."""
        self.seen, self.bad, self.reasons = state["seen"], state["bad"], dict(state["bad_ids"])
