"""The connection code that workers and trainers share; the daemon loads none of it."""
