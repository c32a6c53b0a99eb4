"""What runs in a worker: pages of adapter parameters, which of them each token of a step needs, and the op."""
