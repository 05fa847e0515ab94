"""What longer commands of `keras-gemma` do: arguments in, files out."""
