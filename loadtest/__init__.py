"""Load against a running gateway, every answer checked. See README.md."""
