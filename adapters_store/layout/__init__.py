"""The OCI image layout on disk: files, blobs, documents, and the index of names."""
