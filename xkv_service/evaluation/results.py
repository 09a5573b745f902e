"""What was measured, as rows, as JSON, and merged from several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.statistics import Clusters, Estimate, average, difference, estimate

BASELINE = "full"
AVERAGE = "average"
_SAME = ("fingerprint", "dtype", "protocol", "template", "per_document", "haystack", "qa_data")


@dataclass(frozen=True)
class Marks:
    """What one method got for one document.

    Args:
        seed, number: the document; every method has the same ones.
        scores: of its questions, in the order asked.
        tokens, bytes_full, bytes_stored: of its prefixes (one a document, or one a question), in all.
    """

    seed: int
    number: int
    scores: tuple[float, ...]
    tokens: int
    bytes_full: int
    bytes_stored: int


@dataclass(frozen=True)
class Cell:
    """One task, length and method."""

    task: str
    length: int
    method: str


@dataclass
class Results:
    """All marks of a run.

    Args:
        about: what was run: model, protocol, seed, versions and so on, as JSON values.
        marks: of each cell, by document.
        notes: why a cell has no figures.
    """

    about: dict[str, Any]
    marks: dict[Cell, list[Marks]] = field(default_factory=dict)
    notes: dict[Cell, str] = field(default_factory=dict)

    def add(self, cell: Cell, marks: Marks) -> None:
        """One more document of a cell; a cell with a note keeps none."""
        found = self.marks.setdefault(cell, [])
        if cell in self.notes:
            found.clear()
        else:
            found.append(marks)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each task, length and method, then the averages over tasks, as JSON values."""
        cells = list(self.marks)
        rows = [self._row(cell) for cell in cells]
        lengths = dict.fromkeys(cell.length for cell in cells)
        methods = dict.fromkeys(cell.method for cell in cells)
        for length in lengths:
            for method in methods:
                alike = [cell for cell in cells if (cell.length, cell.method) == (length, method)]
                if len(alike) > 1 and not any(cell in self.notes for cell in alike):
                    rows.append(self._average(length, method, alike))
        return rows

    def to_json(self, *, marks: bool) -> dict[str, Any]:
        """Everything but the marks, or everything."""
        result = {**self.about, "rows": self.rows()}
        if marks:
            result["marks"] = [
                {**vars(cell), "note": self.notes.get(cell), "documents": [vars(one) for one in found]}
                for cell, found in self.marks.items()
            ]
        return result

    def _row(self, cell: Cell) -> dict[str, Any]:
        if cell in self.notes:
            return {**vars(cell), "n": 0, "note": self.notes[cell]}
        marks = self.marks[cell]
        mean, paired = self._estimates(cell)
        return {
            **vars(cell),
            **_figures(mean, paired),
            "n": sum(len(one.scores) for one in marks),
            "documents": len(marks),
            **_bytes(marks),
            **({"by_turn": list(self._by_turn(cell))} if self.about["in_turn"] else {}),
        }

    def _estimates(self, cell: Cell, turn: int | None = None) -> tuple[Estimate, Estimate]:
        base = Cell(cell.task, cell.length, BASELINE)
        scores, bases = (_clusters(self.marks[one], turn) for one in (cell, base))
        return estimate(scores), difference(scores, bases)

    def _by_turn(self, cell: Cell) -> Iterator[dict[str, Any]]:
        for turn in range(min(len(one.scores) for one in self.marks[cell])):
            yield {"turn": turn + 1, **_figures(*self._estimates(cell, turn))}

    def _average(self, length: int, method: str, cells: Sequence[Cell]) -> dict[str, Any]:
        means, paired = zip(*(self._estimates(cell) for cell in cells), strict=True)
        marks = [one for cell in cells for one in self.marks[cell]]
        return {
            **vars(Cell(AVERAGE, length, method)),
            **_figures(average(means), average(paired)),
            "n": sum(len(one.scores) for one in marks),
            "documents": len(marks),
            **_bytes(marks),
        }


def _clusters(marks: Sequence[Marks], turn: int | None) -> Clusters:
    return [one.scores if turn is None else one.scores[turn : turn + 1] for one in marks]


def _figures(mean: Estimate, paired: Estimate) -> dict[str, float | None]:
    return {
        "accuracy": mean.mean,
        "standard_error": mean.standard_error,
        "difference": paired.mean,
        "difference_error": paired.standard_error,
    }


def _bytes(marks: Sequence[Marks]) -> dict[str, float]:
    """Means over documents, and the ratio of the sums."""
    count = len(marks)
    full, stored = sum(one.bytes_full for one in marks), sum(one.bytes_stored for one in marks)
    return {
        "tokens": sum(one.tokens for one in marks) / count,
        "bytes_full": full / count,
        "bytes": stored / count,
        "ratio": full / stored,
    }


def from_json(result: Mapping[str, Any]) -> Results:
    """The results that `to_json(marks=True)` was called on.

    Raises:
        InvalidSpec: the object is none, or has no marks.
    """
    try:
        about = {name: value for name, value in result.items() if name not in ("rows", "marks")}
        results = Results(about)
        for entry in result["marks"]:
            cell = Cell(entry["task"], entry["length"], entry["method"])
            results.marks[cell] = [
                Marks(**{**one, "scores": tuple(one["scores"])}) for one in entry["documents"]
            ]
            if entry["note"] is not None:
                results.notes[cell] = entry["note"]
    except (KeyError, TypeError) as error:
        raise InvalidSpec(
            f"not the results of an evaluation: {type(error).__name__}: {error}",
            hint="give files that xkv eval --out wrote",
        ) from None
    return results


def merge(parts: Sequence[Results]) -> Results:
    """The results of several runs as one: shards, other seeds, other tasks, lengths or methods.

    Every method of a task and length must have been asked the same documents.

    Raises:
        InvalidSpec: the runs differ in model or protocol, or some method lacks documents.
    """
    first = parts[0]
    merged = Results({**first.about, "merged": len(parts)})
    for part in parts:
        for name in _SAME:
            if part.about[name] != first.about[name]:
                raise InvalidSpec(
                    f"the runs differ in {name}: {first.about[name]!r} and {part.about[name]!r}",
                    hint="merge runs of one model and one protocol",
                )
        merged.notes |= part.notes
        for cell, found in part.marks.items():
            known = {(one.seed, one.number): one for one in merged.marks.get(cell, [])}
            known |= {(one.seed, one.number): one for one in found}
            merged.marks[cell] = [known[key] for key in sorted(known)]
    _check_pairs(merged)
    return merged


def _check_pairs(results: Results) -> None:
    for cell, found in results.marks.items():
        base = results.marks.get(Cell(cell.task, cell.length, BASELINE), [])
        asked, wanted = ([(one.seed, one.number, len(one.scores)) for one in side] for side in (found, base))
        if cell not in results.notes and asked != wanted:
            raise InvalidSpec(
                f"{cell.method} has {len(asked)} documents of {cell.task} at {cell.length}, "
                f"{BASELINE} has {len(wanted)}, or others",
                hint="run all methods on the same seeds and shards",
            )
