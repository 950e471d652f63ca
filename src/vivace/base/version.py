"""The version, apart from the package's root, which names what stands above every floor."""

__version__ = "0.1.0"
