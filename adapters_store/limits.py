"""How much the store reads of what others wrote: every limit in one place.

Whatever comes from a file, a registry, an archive or a browser is hostile until it was checked. Sizes are compared
before anything is read into memory, and again while reading; digests are checked before content is used. Beyond the
sizes below this holds everywhere:

- JSON: a key that is there twice, NaN and infinity, nesting that is too deep, numbers of thousands of digits and fields
  of a wrong type are refused. Documents of OCI keep fields that are not known, all others refuse them.
- Files of a store: symbolic links, devices, pipes and folders in the place of files are refused; nothing is opened
  through a link. Policies, keys and the configuration may be links, because cluster software mounts them so, but not
  files that everybody may write.
- Paths: no path is ever taken from a manifest, an index or a server. Files of an adapter have two fixed names, blobs
  the name of their digest, files of attachments a plain name that never becomes a path.
- Compression: nothing is decompressed. Registries are asked for content as it is, archives are plain tar files.
- Adapters: see `reft_plugins.limits` for `adapter.json` and headers of tensor files, which every runtime checks.
- Code: nothing of an adapter is run, no pickle is read, and no template comes from one.

Nothing heavy is imported here, and nothing but constants is defined.
"""

from __future__ import annotations

KIB, MIB = 1024, 1024 * 1024

MAX_NAME_LENGTH = 200
"""Characters of an adapter's name."""
MAX_TAG_LENGTH = 128
"""Characters of a tag."""

MAX_MANIFEST_BYTES = 4 * MIB
"""Of an image manifest: what registries are required to accept."""
MAX_INDEX_BYTES = 128 * MIB
"""Of `index.json`; room for some 200,000 versions and tags."""
MAX_MARKER_BYTES = 4 * KIB
"""Of `oci-layout`."""
MAX_LINE_BYTES = MIB
"""Of one line of the history."""
MAX_METRICS_CHARACTERS = 2048
"""Of a version's metrics as JSON, for the index to repeat them; longer ones are in the manifest alone."""
MAX_ATTACHED_BYTES = 16 * MIB
"""Of each file of an attachment."""
MAX_CERTIFICATE_BYTES = 16 * MIB
"""Of a certificate of an export."""

MAX_CONFIGURATION_BYTES = MIB
"""Of the configuration file."""
MAX_POLICY_BYTES = 256 * KIB
"""Of a policy file."""
MAX_KEY_BYTES = 16 * KIB
"""Of a file with one key, public or private."""
MAX_SIGNATURE_BYTES = 64 * KIB
"""Of one signature (a sigstore bundle); one that this project makes has some 2,000 bytes."""
MAX_SIGNATURES = 256
"""Of one version: the oldest ones, so that whoever attaches more takes nothing away from those."""

MAX_ADDRESS_LENGTH = 1024
"""Characters of a remote's address."""
MAX_ANSWER_BYTES = 4 * MIB
"""Of any answer of a server that is held in memory: manifests, listings, tokens, error messages."""
MAX_REDIRECTS = 5
"""In a row."""
MAX_RETRY_AFTER_SECONDS = 30.0
"""For which a server may make us wait."""
MAX_LOGIN_BYTES = MIB
"""Of the file with logins."""
MAX_PAGES = 1000
"""Of one listing."""
MAX_TAGS = 100_000
"""Of one name at a remote."""
MAX_NAMES = 100_000
"""At a remote."""
MAX_REFERRERS = 1000
"""In a listing of what is attached to one version at a remote."""
MAX_ATTACHMENTS = 256
"""Of one version, pulled from a remote; more are left where they are."""
MAX_LISTED_FILES = 10_000
"""Of one folder of a repository of the Hugging Face Hub."""
MAX_MEMORY_BYTES = 4 * KIB
"""Of a file that remembers when a tag was looked up at a remote."""

MAX_MEMBERS = 1_000_000
"""Of an archive."""
MAX_NODES = 1000
"""Of a lineage graph; what is nearest to the root is kept."""

MAX_SHOWN_CERTIFICATE_BYTES = MIB
"""Of a certificate that the page draws."""
MAX_SHOWN_CHARACTERS = 2000
"""Of one text of an adapter on the page; the JSON has all of them."""
