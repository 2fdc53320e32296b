"""What a person reads after a study: summary and figure."""
