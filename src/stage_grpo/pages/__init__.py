"""What people look at: reports of runs, galleries of images."""
