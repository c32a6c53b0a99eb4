"""How much the store reads of what others wrote. Whatever is larger is refused before it is read."""

from __future__ import annotations

MAX_POLICY_BYTES = 256 * 1024
"""Of a policy file."""
MAX_KEY_BYTES = 16 * 1024
"""Of a file with one key, public or private."""
MAX_SIGNATURE_BYTES = 64 * 1024
"""Of one signature (a sigstore bundle); one that this project makes has some 2,000 bytes."""
MAX_SIGNATURES = 256
"""Of one version: the oldest ones, so that whoever attaches more takes nothing away from those."""
