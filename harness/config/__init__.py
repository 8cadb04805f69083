"""What a user writes: the schema, experiment files, editions."""
