"""What a user starts lies here; its helpers lie in the folders."""
