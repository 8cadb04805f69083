"""What users write: the schema, experiment files, editions."""
