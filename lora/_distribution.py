"""Refuse to run beside the distribution `lora`, another project that also installs a package `lora`.

pip lets each of the two overwrite the files of the other, and uninstalling one deletes files of both.
This check runs when our `__init__.py` is the one that was installed last.
"""

from importlib import metadata


def refuse_other_distribution() -> None:
    """ImportError if a distribution named `lora` has installed `lora/__init__.py` too."""
    try:
        other = metadata.distribution("lora")
    except metadata.PackageNotFoundError:
        return
    if "lora/__init__.py," in (other.read_text("RECORD") or ""):
        raise ImportError(
            f"the distribution lora {other.version} is installed beside lora-layers: both install the "
            "package `lora` and overwrite each other's files. Keep one of them: "
            "pip uninstall -y lora lora-layers && pip install lora-layers"
        )
