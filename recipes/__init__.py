"""One folder per training recipe; copy one to start your own."""
