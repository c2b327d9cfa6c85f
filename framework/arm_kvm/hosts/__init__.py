"""The hosts of a run: started when a test asks, made ahead where one will, replaced when they are lost."""
