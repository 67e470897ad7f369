"""What a check of a site says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `remedy` where it is not ok. A note is worth reading but stops nothing."""

    name: str
    outcome: str  # ok, note, fail
    found: str
    remedy: str = ""

    def line(self) -> str:
        """As printed."""
        return f"{self.outcome.upper() if self.outcome == 'fail' else self.outcome:<5} {self.name}: {self.found}" + (
            f" -> {self.remedy}" if self.remedy else ""
        )
