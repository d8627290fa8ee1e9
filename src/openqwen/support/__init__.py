"""What all packages use: errors, files, progress, random generators, settings, devices, stages."""
