"""unit: no server. integration: one server. acceptance: real processes. migration: the schema. typing: user code."""
