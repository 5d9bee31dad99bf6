"""The console's static files; this package only marks their place."""
