"""The bundled demo model and the readable documents it was trained on.

Nothing heavy is imported here: asking where the model lies must not load torch.
"""

from pathlib import Path

__all__ = ["demo_calibration_path", "demo_model_path"]


def demo_model_path() -> Path:
    """Return the folder of the bundled model, loadable with ``AutoModelForCausalLM.from_pretrained``."""
    return Path(__file__).parent / "model"


def demo_calibration_path() -> Path:
    """Return where the bundled model's calibration lies, if it comes with this installation."""
    return Path(__file__).parent / "calibration.safetensors"
