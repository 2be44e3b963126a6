"""Measurements of gradients of single responses: what the aggregations assume, and what they do."""
