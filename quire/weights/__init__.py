"""Checkpoints: where they are (`hub`), what their files hold (`files`, without torch), and loading them (`load`)."""
