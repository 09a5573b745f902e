"""Every task by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xkv_service.errors import InvalidSpec
from xkv_service.evaluation.tasks.base import Task
from xkv_service.evaluation.tasks.demo import demo_tasks
from xkv_service.evaluation.tasks.frequencies import CommonWords, FrequentWords
from xkv_service.evaluation.tasks.haystack import Haystack, written_prose
from xkv_service.evaluation.tasks.needles import needle_tasks
from xkv_service.evaluation.tasks.reading import Passages, Reading, written_notes
from xkv_service.evaluation.tasks.variables import VariableTracking


@dataclass(frozen=True)
class Material:
    """What tasks are made from that can be brought along: prose to hide needles in, passages to ask about."""

    essay: Haystack = written_prose
    passages: Passages = written_notes


def ruler_tasks(material: Material) -> list[Task]:
    """The tasks after RULER's definitions."""
    return [
        *needle_tasks(material.essay),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        Reading(material.passages),
    ]


def find_tasks(names: Sequence[str], material: Material | None = None) -> list[Task]:
    """Tasks by name; "ruler" and "demo" stand for all of theirs.

    Raises:
        InvalidSpec: an unknown name.
    """
    families: dict[str, list[Task]] = {
        "ruler": ruler_tasks(material or Material()),
        "demo": [*demo_tasks()],
    }
    known = {task.name: task for family in families.values() for task in family}
    found: dict[str, Task] = {}
    for name in names:
        if name not in families and name not in known:
            raise InvalidSpec(f"task {name!r} is unknown", hint=f"use {', '.join([*families, *known])}")
        found |= {task.name: task for task in families.get(name, [])}
        found |= {name: known[name]} if name in known else {}
    return list(found.values())
