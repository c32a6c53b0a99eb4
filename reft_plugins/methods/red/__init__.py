"""RED: representation editing by scaling and shifting."""

from reft_plugins.methods.red.method import RED

__all__ = ["RED"]
