"""REINFORCE with a KL penalty on one adapter vector (paper section 3.1). No Ray."""
