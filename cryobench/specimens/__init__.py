"""Where structures come from: archives, files, code; and the file formats of the field."""
