"""What happens to runs that exist: replaced by others, listed, deleted, and the space that they take."""
