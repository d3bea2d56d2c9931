"""The version. The build reads BASE from here, without importing anything."""

BASE = "0.1.0"


def version() -> str:
    """The version of what runs: as the extension was built, "0.1.0+cu130.sm80.sm90a" with CUDA kernels inside."""
    from . import backends

    try:
        return backends.native().__version__
    except (ImportError, AttributeError):  # not built, or by sources older than this file
        return BASE
