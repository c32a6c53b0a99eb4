"""Who vouches for an adapter: signatures of versions, and the policy that says which ones are needed."""
