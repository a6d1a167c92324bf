"""Where blocks go that the prefix cache lets go of: host memory, then disk. docs/tiers.md."""
