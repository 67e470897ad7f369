"""What packing met: units left out and why, irregularities by kind, strip modes; as data and as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jmt_dist.data.pack_shard import ShardResult, result_of
from jmt_dist.data.pack_video import Note
from jmt_dist.data.rules import RULES
from jmt_dist.data.shards import REPORT, REPORT_TEXT
from jmt_dist.data.strip import MODES

SHOWN, LONGEST = 3, 72  # units named per kind of irregularity in the text, and letters about each; the JSON has all


@dataclass(frozen=True)
class PackReport:
    """`omitted` maps a unit to the reason; `counts` has units, rows and samples by split; `shards` as they were made."""

    source: str
    release: str
    counts: Mapping[str, Mapping[str, int]]
    omitted: Mapping[str, str]
    notes: tuple[Note, ...]
    shards: tuple[ShardResult, ...]

    @property
    def modes(self) -> tuple[int, ...]:
        """Samples by strip mode."""
        return tuple(sum(shard.modes[mode] for shard in self.shards) for mode in range(len(MODES)))

    @property
    def unreadable(self) -> list[tuple[str, int]]:
        """(unit, frame) of crops that no decoder takes: black, and 0 in `present`."""
        return sorted({crop for shard in self.shards for crop in shard.unreadable})

    def all_notes(self) -> list[Note]:
        """Notes of pass 1, and one for each unit with unreadable or odd crops."""
        crops: dict[str, list[int]] = {}
        for unit, frame in self.unreadable:
            crops.setdefault(unit, []).append(frame)
        found = [Note(unit, "unreadable crops", ", ".join(map(str, frames))) for unit, frames in crops.items()]
        odd: Counter[tuple[str, str]] = Counter()
        for shard in self.shards:
            odd.update({(unit, kind): count for unit, kind, count in shard.kinds})
        found += [Note(unit, kind, f"{count} frames") for (unit, kind), count in odd.items()]
        return sorted([*self.notes, *found], key=lambda note: (note.what, note.unit))

    def to_json(self) -> str:
        """The text of pack-report.json."""
        notes = self.all_notes()
        data = {
            "source": self.source,
            "release": self.release,
            "counts": self.counts,
            "omitted": self.omitted,
            "modes": dict(zip(MODES, self.modes, strict=True)),
            "kinds": dict(sorted(Counter(note.what for note in notes).items())),
            "rules": {what: RULES.get(what, "") for what in sorted({note.what for note in notes})},
            "notes": [asdict(note) for note in notes],
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(data, indent=1) + "\n"

    def to_text(self) -> str:
        """The report for people."""
        lines = [f"Packed release {self.release} from {self.source}", ""]
        for split, count in self.counts.items():
            lines.append(f"{split:<12}" + "  ".join(f"{number:>10,} {what}" for what, number in count.items()))
        size = sum(shard.bytes for shard in self.shards)
        frames, black = sum(shard.frames for shard in self.shards), sum(shard.black for shard in self.shards)
        modes = ", ".join(f"{count:,} {name} (mode {mode})" for mode, (name, count) in enumerate(zip(MODES, self.modes, strict=True)))
        lines += ["", f"{len(self.shards)} shards, {size / 1e9:.3f} GB; {frames:,} frames with a face, {black:,} black"]
        lines += [f"strips: {modes}", "", *self.omission_lines(), "", "Irregularities that a rule settled:"]
        kinds: dict[str, list[Note]] = {}
        for note in self.all_notes():
            kinds.setdefault(note.what, []).append(note)
        rows = []
        for what, notes in kinds.items():
            named = "; ".join(f"{note.unit}: {_short(note.detail)}" if note.unit else _short(note.detail) for note in notes[:SHOWN])
            rows.append((what, str(len(notes)), RULES.get(what, ""), f"{named}{'; …' if len(notes) > SHOWN else ''}"))
        lines += table(("what", "units", "rule", "where"), rows) if rows else ["  none"]
        return printable("\n".join(lines)).replace(f"{self.source}/", "") + "\n"  # paths are long; from the root they fit a line

    def omission_lines(self) -> list[str]:
        """A table of the units left out, after a line that counts them."""
        rows = [tuple(printable(word).replace(f"{self.source}/", "") for word in pair) for pair in self.omitted.items()]
        return [f"Units left out: {len(rows)}", *(table(("unit", "why"), rows) if rows else [])]

    def write(self, folder: Path, work: Path) -> None:
        """Write both files, by way of the folder `work` on the same disk."""
        for name, text in ((REPORT_TEXT, self.to_text()), (REPORT, self.to_json())):
            partial = work / name
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


def printable(text: str) -> str:
    """`text` with the bytes of names that are not UTF-8 spelled out, so that any stream takes it."""
    return text.encode("utf-8", "backslashreplace").decode()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they need to be; the last one is not filled up."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    lines = [[*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]] for row in (head, *rows)]
    return ["  " + "  ".join(line).rstrip() for line in lines]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def read_report(folder: Path) -> PackReport | None:
    """The report of a shard folder, None where there is none."""
    try:
        data: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        shards = tuple(result_of(shard) for shard in data["shards"])
        of_shards = {"unreadable crops", *(kind for shard in shards for _, kind, _ in shard.kinds)}
        notes = tuple(Note(**note) for note in data["notes"] if note["what"] not in of_shards)
        return PackReport(data["source"], data["release"], data["counts"], data["omitted"], notes, shards)
    except (OSError, ValueError, KeyError, TypeError):
        return None
