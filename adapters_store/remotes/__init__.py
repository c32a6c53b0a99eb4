"""Other places that hold adapters: OCI registries, the Hugging Face Hub, stores in other folders."""
