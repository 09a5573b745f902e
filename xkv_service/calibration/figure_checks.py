"""What compression reads of a calibration's figures, checked: the rest is for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xkv_artifacts.errors import CorruptArtifact


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Row(_Part):
    asked: float
    step: str
    kl: float | None = None
    kl_error: float | None = None
    documents: int = 0


class _Threshold(_Part):
    ratio: float
    kl: float = Field(ge=0)


class _Selection(_Part):
    reuse: list[int] = Field(default_factory=list)


class _Read(_Part):
    validation: list[_Row] = Field(default_factory=list)
    thresholds: list[_Threshold] = Field(default_factory=list)
    selection: _Selection | None = None


def check_figures(calibration_id: str, figures: Mapping[str, Any]) -> None:
    """See that figures which decide something are what they should be.

    Raises:
        CorruptArtifact: one is not; the message names the calibration and the figure.
    """
    try:
        _Read.model_validate(dict(figures))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise CorruptArtifact(
            f"calibration {calibration_id[:12]}: figures.{place}: {first['msg']}",
            hint="remove it with `xkv calibrations rm` and calibrate again",
        ) from None
