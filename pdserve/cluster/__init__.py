"""Where workers run: placement, Ray actors, and the supervisor that recreates the ones that die."""
