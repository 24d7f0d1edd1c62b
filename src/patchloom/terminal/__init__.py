"""What the command line shows and reads: options and their help, figures, tab completion."""
