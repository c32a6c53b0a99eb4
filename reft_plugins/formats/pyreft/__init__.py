"""pyreft checkpoints (stanfordnlp/pyreft 0.1 and earlier): what `ReftModel.save` and its trainer's checkpoints hold.

A directory has `config.json` and one `intkey_<key>.bin` per intervention. A trainer checkpoint keeps the same files
without `config.json` in `intervenable_model/`. Positions, activation and dropout are in neither.
"""

from reft_plugins.formats.pyreft.format import PyreftFormat

__all__ = ["PyreftFormat"]
