"""Drop-in models, a file each."""
