"""The loss inside the trainers of other packages: a module for each, which needs that package and imports it.

`TESTED` has the versions that the tests run with, and is the one place that pins them. Of `TESTED_ALONE` nothing but
the package itself is installed: tests and examples take a few functions out of these. (`.ci/run` names the torchao that
torchtune can import.)
"""

TESTED = {"transformers": "5.24.0", "accelerate": "1.15.0", "trl": "1.16.0", "lightning": "2.6.6"}
TESTED_ALONE = {
    "torchtune": "0.6.1",
    "torchdistill": "1.1.5",
    "timm": "1.0.31",
    "liger-kernel": "0.8.5",
    "nvidia-modelopt": "0.47.0",
    "nemo-automodel": "0.7.0",
}


def missing(package: str, extra: str, error: ImportError) -> ImportError:
    """What to raise where a package that an integration needs cannot be imported."""
    return ImportError(
        f"fused_kd.integrations.{extra} needs {package} (tested with {TESTED[package]}), which cannot be imported: "
        f"{error}; pip install 'fused_kd[{extra}]'"
    )
