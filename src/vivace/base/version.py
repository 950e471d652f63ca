"""The version, apart from the package's root, which names what stands above every floor, and the mark of its files."""

__version__ = "0.1.0"
ENGINE_MAGIC = b"VIVACE\0E"  # the first bytes of a saved engine
