"""The text environment."""
