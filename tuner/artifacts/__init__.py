"""What a run hands over: files that other software loads."""
