"""The loss inside the trainers of other packages: a module for each, which needs that package and imports it.

`TESTED` has the versions that the tests run with, and is the one place that pins them.
"""

TESTED = {"transformers": "5.24.0", "accelerate": "1.15.0", "trl": "1.16.0"}


def missing(package: str, extra: str, error: ImportError) -> ImportError:
    """What to raise where a package that an integration needs cannot be imported."""
    return ImportError(
        f"fused_kd.integrations.{extra} needs {package} (tested with {TESTED[package]}), which cannot be imported: "
        f"{error}; pip install 'fused_kd[{extra}]'"
    )
