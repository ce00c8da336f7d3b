"""What every module does around the steps of its method."""
