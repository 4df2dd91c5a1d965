"""The history of our tables, run by `celery -A app outbox migrate`."""
