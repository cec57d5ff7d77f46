"""What papers claim of their methods, measured with three seeds: docs/claims.md."""
