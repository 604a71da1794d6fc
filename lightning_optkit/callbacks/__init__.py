"""When to measure and when to act; never how."""
