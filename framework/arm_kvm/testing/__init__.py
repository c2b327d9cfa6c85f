"""What test cases share beyond fixtures: the scene of the notifier cases."""
