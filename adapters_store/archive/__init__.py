"""Versions in one file: a tar of an OCI image layout, which other programs call `oci-archive`."""
