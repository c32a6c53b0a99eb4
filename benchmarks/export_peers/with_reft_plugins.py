"""A model with a LoRA merged into it, written by the export without measuring."""

from __future__ import annotations

import json
import sys

from reft_ollama.export import export_ollama


def main(job: dict) -> None:
    export_ollama(job["adapter"], job["base"], job["out"], dtype=job["dtype"], measure=False)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    from peak import report

    report()
