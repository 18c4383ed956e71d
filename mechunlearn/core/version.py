"""The version of this package, as `pip` knows it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mechunlearn")
except PackageNotFoundError:  # a copy of the source that was never installed
    __version__ = "0+unknown"
