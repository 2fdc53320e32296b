"""Opening, sharing and resuming a study."""
