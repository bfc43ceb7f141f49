"""The use cases that hold a rule, one a module."""
