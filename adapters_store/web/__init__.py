"""A read-only web page of the store. FastAPI and matplotlib are imported only when it is served or drawn."""
