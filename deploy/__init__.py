"""How baton is run: the command, the controller, cluster files, the demo model."""
