"""The coordinator's own registry and router under a virtual clock, with modelled workers around them."""
