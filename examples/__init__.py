"""Programs that show what the project does; run them from the repository's root."""
