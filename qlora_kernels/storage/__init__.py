"""Files and folders on disk: written whole or not at all, read with errors that name what is wrong."""
