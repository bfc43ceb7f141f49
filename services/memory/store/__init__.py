"""Where memories and preferences are kept."""
