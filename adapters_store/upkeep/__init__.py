"""Looking after a store as a whole."""
