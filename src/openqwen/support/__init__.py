"""What all rooms use: errors, files, progress, random generators, settings, devices, stages."""
