"""The hosts of a run: started when a test needs them or in advance, and replaced when they are lost."""
