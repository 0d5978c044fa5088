"""What ran, in words, figures and a picture."""
