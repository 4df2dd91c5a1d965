"""Side by side in one run: ours and plain Celery, on the same servers, round by round. Nothing asserts a time."""
