"""Policy optimisation's rollouts: responses that are sampled in training, and what scores them."""
