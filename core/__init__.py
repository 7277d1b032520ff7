"""What every process of baton agrees on: requests, errors, configuration, clock, log, metrics. No torch here."""
