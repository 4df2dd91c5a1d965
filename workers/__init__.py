"""A small shop: what the demo, docker-compose and the chaos tests run."""
